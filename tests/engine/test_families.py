"""Every family of tools/shapes: served, compared block by block with torch, and trained in three ways."""

from pathlib import Path

import numpy as np
import pytest

from agentd.nn.gguf_file import GGUFFile
from agentd.trainer import agreement
from tests.engine.trainer.conftest import LlamaCpp
from tests.support.engine_samples import Interruption, score
from tools import model_matrix
from tools.shapes.families import FAMILIES

ZEROTH_ORDER_ALONE = {"gemma3n", "gemma4-e2b"}
"""Their blocks take more than hidden states."""


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family(name: str, tmp_path: Path) -> None:
    result = model_matrix.run(name, tmp_path)
    mezo = result.losses.pop("mezo")
    assert mezo.fell, mezo
    if name in ZEROTH_ORDER_ALONE:
        assert result.reason is not None
        assert "embedding of the token" in result.reason
        return
    assert result.reason is None
    assert len(result.cosines) == result.blocks
    assert min(result.cosines) >= agreement.AGREES
    assert set(result.losses) == {"suffix-bp", "blockwise-bp"}
    assert all(losses.fell for losses in result.losses.values()), result.losses
    suffix = result.losses["suffix-bp"].agreement
    assert suffix is not None
    assert suffix >= agreement.AGREES


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_serves_what_llama_cpp_serves(name: str, tmp_path: Path) -> None:
    with model_matrix.Family(name, tmp_path) as family:
        text, n = "hello, ", 6
        answer = family.greedy(text, n)
        plain = LlamaCpp(family.path)
        tokens = plain.tokens(text)
        chosen: list[int] = []
        for _ in range(n):
            logits = plain.logits(tokens + chosen)
            assert np.isfinite(logits).all()
            assert logits.std() > 0.1
            chosen.append(int(logits[-1].argmax()))
        assert answer == b"".join(map(family.engine.vocabulary.piece, chosen)).decode(errors="replace")


def test_a_block_that_disagrees_bounds_what_is_trained(tmp_path: Path) -> None:
    with model_matrix.Family("qwen3", tmp_path) as family:
        sample = family.sample()
        file = GGUFFile(family.path)
        whole = agreement.compare(file, sample)
        assert whole.first == 0
        # As if a rule were wrong for one block's tensor.
        broken = file.load("blk.1.attn_k.weight").numpy()[::-1].copy()
        load = file.load

        def loaded(name: str, *arguments: object, **more: object) -> object:
            out = load(name, *arguments, **more)  # type: ignore[arg-type]
            if name == "blk.1.attn_k.weight":
                out.numpy()[:] = broken
            return out

        file.load = loaded  # type: ignore[method-assign, assignment]
        part = agreement.compare(file, sample)
    assert part.first == 2
    assert part.reason is not None
    assert "block 1" in part.reason
    assert part.cosines[0] == pytest.approx(whole.cosines[0])


@pytest.mark.parametrize("name", ["granite4", "lfm2", "qwen3.5"])
def test_a_recurrent_state_is_never_cut_back(name: str, tmp_path: Path) -> None:
    """What a slot or a session had read before is in no answer, wherever the texts part and however often serving cuts
    in."""
    texts = ["the same beginning, then one", "the same beginning, and another end", "the same beginning"]
    fresh = []
    for text in texts:
        with model_matrix.Family(name, tmp_path) as family:
            fresh.append(family.greedy(text))
    with model_matrix.Family(name, tmp_path) as family:
        assert [family.greedy(text) for text in texts] == fresh
        undisturbed = family.likelihoods()
        family.background.close()
        interruption = Interruption()
        family.background = family.engine.background(interruption)
        family.background.use("0")
        encoded = list(family.make_examples(len(family.examples)))
        interruption.at = {1, 2}
        scores = score(family.background, encoded)
        assert not interruption.at
        assert [v for each in scores for v in (*each.choices, *each.target)] == pytest.approx(undisturbed, abs=1e-5)
