from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.errors import GenrecError
from genrec.tokenizer.report import report
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig, _spread
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


def test_thousands_of_equal_titles_get_ids_of_their_own() -> None:
    rng = np.random.default_rng(0)
    others = rng.normal(size=(500, 8))
    x = np.concatenate([others[:250], np.tile(others[:1], (4000, 1)), others[250:]]).astype(np.float32)
    config = TokenizerConfig(levels=3, codes=24)
    ids = SemanticIDs.fit(x, config)
    assert np.array_equal(ids.codes, SemanticIDs.fit(x, config).codes)
    assert len(np.unique(ids.codes, axis=0)) == 4500 and ids.trie.items == 4500
    for length in (1, 2):  # nowhere more than fit
        assert np.unique(ids.codes[:, :length], axis=0, return_counts=True)[1].max() <= 24 ** (3 - length)
    assert len(np.unique(ids.codes[250:4250, 0])) <= 9  # of at least 7: they stay together as far as they fit


def test_overflow_leaves_the_nearest_and_moves_the_others_to_the_nearest_code_with_room() -> None:
    book = np.array([[0.0], [1.0], [3.0]], np.float32)
    codes = np.array([[7, 0], [7, 0], [7, 0], [7, 0], [7, 1], [9, 0]], np.int32)
    residual = np.array([[0.4], [0.0], [-0.9], [0.1], [1.0], [0.3]], np.float32)
    _spread(codes, residual, book, room=2)
    assert codes.tolist() == [[7, 1], [7, 0], [7, 2], [7, 0], [7, 1], [9, 0]]
    before = codes.copy()
    _spread(codes, residual, book, room=2)
    assert np.array_equal(codes, before)


def test_a_catalogue_of_more_items_than_ids_names_the_cure() -> None:
    x = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)
    with pytest.raises(GenrecError, match=r"16 IDs.*more codes or one more level"):
        SemanticIDs.fit(x, TokenizerConfig(levels=2, codes=4))
    assert len(np.unique(SemanticIDs.fit(x[:16], TokenizerConfig(levels=2, codes=4)).codes, axis=0)) == 16


def test_new_items_get_free_codes_and_old_ones_keep_theirs() -> None:
    x, _ = clustered()
    ids = SemanticIDs.fit(x, TokenizerConfig(codes=32))
    more = ids.extend(x[:20] + 0.01)
    assert np.array_equal(more.codes[:200], ids.codes)
    assert len({tuple(c) for c in more.codes}) == 220
    assert (more.codes[200:, 0] == ids.codes[:20, 0]).mean() > 0.9  # near items share their first code


def test_new_items_walk_on_from_a_full_prefix_until_no_id_is_left() -> None:
    ids = SemanticIDs.fit(np.ones((4, 3), np.float32), TokenizerConfig(levels=2, codes=4))
    more = ids.extend(np.ones((12, 3), np.float32))
    assert np.array_equal(more.codes[:4], ids.codes) and len(np.unique(more.codes, axis=0)) == 16
    with pytest.raises(GenrecError, match=r"17 items cannot have different semantic IDs.*more codes"):
        more.extend(np.ones((1, 3), np.float32))


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
