from pathlib import Path

import pytest
from tests_support import KINDS, shop

import prompts
from genrec.data import load_dataset
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.tools.sarm.anchors import AnchorStore, template_anchor
from serving.anchors import write_anchors
from serving.llm import PromptTooLong, Scripted
from serving.llm.base import Chat

GOOD = '{"point":"p","theme":"t","topic":"o","audience":"a","format":"f","scene":"s"}'


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return load_dataset(shop(tmp_path_factory.mktemp("shop"), per_kind=2, users=12)).catalog


def test_every_item_gets_an_anchor_once(items: Catalog, tmp_path: Path) -> None:
    store, model = AnchorStore(tmp_path / "a.jsonl"), Scripted(lambda chat: GOOD)
    done = write_anchors(items, lambda: model, prompts.anchor(), store, chunk=5)
    assert (done.asked, done.written, done.replaced) == (2 * len(KINDS), 2 * len(KINDS), 0)
    assert {a.model for a in store.all().values()} == {"scripted"} and len(model.calls) == len(items)
    again = write_anchors(items, lambda: pytest.fail("not needed"), prompts.anchor(), store)
    assert (again.current, again.written) == (len(items), 0)


def test_bad_replies_are_asked_again_and_then_replaced(items: Catalog, tmp_path: Path) -> None:
    def reply(chat: Chat) -> str:
        last = chat[-1]["content"]
        if "number 0" in last:
            return "I will not."
        return GOOD if "JSON object alone" in last or "number 1" not in last else "{"

    store = AnchorStore(tmp_path / "a.jsonl")
    done = write_anchors(items, lambda: Scripted(reply), prompts.anchor(), store)
    found = store.all()
    refused = [row for row in range(len(items)) if "number 0" in items.title(row)]
    assert done.replaced == len(refused) and done.retried > done.replaced
    for row in refused:
        assert found[items.item(row)].values == template_anchor(items, row).values
        assert found[items.item(row)].model == "template"
    assert write_anchors(items, lambda: pytest.fail("tried before"), prompts.anchor(), store).written == 0


def test_a_job_that_died_goes_on_after_its_last_chunk(items: Catalog, tmp_path: Path) -> None:
    calls: list[int] = []

    class Dying(Scripted):
        def generate(self, chats, schema=None, max_tokens=160):
            calls.append(len(chats))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().generate(chats, schema, max_tokens)

    store = AnchorStore(tmp_path / "a.jsonl")
    with pytest.raises(KeyboardInterrupt):
        write_anchors(items, lambda: Dying(lambda chat: GOOD), prompts.anchor(), store, chunk=4)
    assert len(store.all()) == 8
    done = write_anchors(items, lambda: Scripted(lambda chat: GOOD), prompts.anchor(), store, chunk=4)
    assert (done.current, done.written) == (8, len(items) - 8)


def test_a_prompt_that_does_not_fit_gets_the_template(items: Catalog, tmp_path: Path) -> None:
    class Small(Scripted):
        def generate(self, chats, schema=None, max_tokens=160):
            raise PromptTooLong("too long", [None] * len(chats))

    store = AnchorStore(tmp_path / "a.jsonl")
    done = write_anchors(items, lambda: Small(lambda chat: GOOD), prompts.anchor(), store, rows=[0, 1])
    assert (done.asked, done.replaced) == (2, 2)
    with pytest.raises(GenrecError, match="chunk"):
        write_anchors(items, lambda: Small(lambda chat: GOOD), prompts.anchor(), store, chunk=0)
