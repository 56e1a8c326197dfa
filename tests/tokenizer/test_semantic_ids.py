from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.errors import GenrecError
from genrec.tokenizer.report import report
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig
from genrec.tokenizer.trie import Trie


def clustered(n: int = 200, d: int = 12, centres: int = 8, seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    rng = np.random.default_rng(seed)
    which = rng.integers(0, centres, n)
    points = rng.normal(size=(centres, d))[which] * 3 + rng.normal(size=(n, d)) * 0.3
    return points.astype(np.float32), [["shop", f"kind {w}"] for w in which]


def test_ids_are_unique_even_for_identical_embeddings() -> None:
    x = np.ones((12, 4), np.float32)
    ids = SemanticIDs.fit(x, TokenizerConfig(levels=2, codes=12))
    assert len({tuple(c) for c in ids.codes}) == 12


def test_the_same_config_gives_the_same_ids() -> None:
    x, _ = clustered()
    a, b = (SemanticIDs.fit(x, TokenizerConfig(codes=16)) for _ in range(2))
    assert np.array_equal(a.codes, b.codes)


def test_the_report_sees_structure_and_its_absence() -> None:
    x, kinds = clustered()
    ids = SemanticIDs.fit(x, TokenizerConfig(codes=16))
    good = report(ids, x, kinds)
    assert good.collisions == 0
    assert good.reconstruction < 0.2
    assert good.purity is not None and good.purity_floor is not None
    assert good.purity[0] > 0.9 > good.purity_floor
    shuffled = report(ids, x, [kinds[i] for i in np.random.default_rng(1).permutation(len(kinds))])
    assert shuffled.purity is not None and shuffled.purity[0] < 0.6
    assert report(ids, x, [[] for _ in kinds]).purity is None
    assert all(0 < u <= 1 for u in good.utilisation) and all(0 <= e <= np.log(16) for e in good.entropy)


def test_prefix_groups_beyond_the_codebook_name_the_cure() -> None:
    x = np.concatenate([np.zeros((9, 4)), np.eye(4)]).astype(np.float32)
    with pytest.raises(GenrecError, match="more codes or one more level"):
        SemanticIDs.fit(x, TokenizerConfig(levels=2, codes=4))


def test_new_items_get_free_codes_and_old_ones_keep_theirs() -> None:
    x, _ = clustered()
    ids = SemanticIDs.fit(x, TokenizerConfig(codes=32))
    more = ids.extend(x[:20] + 0.01)
    assert np.array_equal(more.codes[:200], ids.codes)
    assert len({tuple(c) for c in more.codes}) == 220
    assert (more.codes[200:, 0] == ids.codes[:20, 0]).mean() > 0.9  # near items share their first code


def test_a_full_prefix_refuses_a_new_item() -> None:
    ids = SemanticIDs.fit(np.ones((4, 3), np.float32), TokenizerConfig(levels=2, codes=4))
    with pytest.raises(GenrecError, match="more codes"):
        ids.extend(np.ones((1, 3), np.float32))


def test_saved_ids_come_back_and_damage_is_named(tmp_path) -> None:
    x, _ = clustered()
    ids = SemanticIDs.fit(x, TokenizerConfig(codes=16))
    ids.save(tmp_path)
    again = SemanticIDs.load(tmp_path)
    assert np.array_equal(again.codes, ids.codes) and np.allclose(again.reconstruct(), ids.reconstruct())
    file = tmp_path / "semantic_ids.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(GenrecError, match="cannot be read"):
        SemanticIDs.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"format": 99}')
    with pytest.raises(GenrecError, match="another format"):
        SemanticIDs.load(tmp_path)


@pytest.mark.parametrize("x", [np.zeros((0, 4)), np.full((5, 4), np.nan)])
def test_bad_embeddings_are_refused(x: np.ndarray) -> None:
    with pytest.raises(GenrecError):
        SemanticIDs.fit(x, TokenizerConfig(levels=2, codes=4))


@pytest.mark.parametrize("settings", [{"levels": 1}, {"codes": 1}])
def test_bad_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(GenrecError):
        TokenizerConfig(**settings)


def test_the_trie_leads_every_item_to_itself() -> None:
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 5, (60, 3)), axis=0)[rng.permutation(10)]
    trie = Trie.build(codes)
    for row, code in enumerate(codes):
        assert trie.leaf_items[trie.node(tuple(code))] == row
        assert trie.path[row, -1] == trie.node(tuple(code))
    for level in range(3):
        children = trie.children[level]
        assert sorted(children[children >= 0].tolist()) == list(range(trie.size(level + 1)))
    with pytest.raises(GenrecError, match="starts with"):
        trie.node((99,))


def test_the_trie_refuses_shared_ids() -> None:
    with pytest.raises(GenrecError, match="unique"):
        Trie.build(np.array([[0, 1], [0, 1], [1, 1]]))


def test_pooled_features_are_means_below_a_node() -> None:
    trie = Trie.build(np.array([[1, 0], [0, 0], [1, 1]]))
    pooled = trie.pooled(1, torch.tensor([[2.0], [7.0], [4.0]]))
    assert pooled.flatten().tolist() == [7.0, 3.0]
