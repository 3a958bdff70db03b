"""All positions at once give what stepping through the real cache gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from pqlab import CacheConfig, PagedPQCache, PQConfig
from pqlab.evaluation.teacher_forced import TeacherForcedCache, from_codebooks, schedule
from pqlab.quantization import Codebooks
from pqlab.transformers_api import cache_argument

SMALL = CacheConfig(page_size=16, residual_length=20, num_sinks=3, max_pages=60)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("prompt", "maps"), [(1, False), (50, False), (119, False), (50, True), (1, True), (50, "unfitted")]
)
def test_it_agrees_with_step_by_step_decode(make_model, kind, prompt, maps):
    """Behind a map in few bits the real cache's exact tokens are off by its rounding, far less than its codes are."""
    model = make_model(kind)
    model.set_attn_implementation("pqlab")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6), maps=bool(maps))
    books = books.unfitted() if maps == "unfitted" else books
    ids = torch.randint(0, 200, (1, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forced = TeacherForcedCache(model, from_codebooks(books, SMALL.page_size), SMALL, prompt)
        at_once = model(ids, **cache_argument(model, forced)).logits[0]
        cache = PagedPQCache(model, books, SMALL)
        steps = [model(ids[:, :prompt], **cache_argument(model, cache)).logits[0]]
        for t in range(prompt, 160):
            steps.append(model(ids[:, t : t + 1], **cache_argument(model, cache)).logits[0])
        exact = model(ids).logits[0]
    lossy = float((at_once - exact).abs().max())
    assert lossy > 0.1, "the codec is lossy, the logits should differ"
    torch.testing.assert_close(at_once, torch.cat(steps), rtol=0, atol=0.02 * lossy if maps else 1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_continuations_of_one_prefill_agree_with_a_run_of_their_own(make_model, kind):
    """Flushes fall into the continuation, and the second one starts from the prompt again."""
    model = make_model(kind)
    model.set_attn_implementation("pqlab")
    quantize = from_codebooks(Codebooks.random(model, pq=PQConfig(M=8, nbits=6)))
    ids = torch.randint(0, 200, (1, 160), generator=torch.Generator().manual_seed(0))
    others = torch.randint(0, 200, (1, 45), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prefix = DynamicCache(config=model.config)
        model(ids[:, :90], **cache_argument(model, prefix))
        for behind in (others, ids[:, 90:]):
            cache = TeacherForcedCache(model, quantize, SMALL, prefix=prefix)
            continued = model(behind, **cache_argument(model, cache)).logits[0]
        whole = model(ids, **cache_argument(model, TeacherForcedCache(model, quantize, SMALL, 90))).logits[0]
    torch.testing.assert_close(continued, whole[90:], rtol=0, atol=1e-3)


def test_schedule_is_what_the_cache_does():
    from pqlab.cache import SequenceGroup
    from pqlab.paging import PagePool

    for prompt in (1, 16, 40, 90):
        group = SequenceGroup(PagePool(60), SMALL)
        group.plan_step(0, prompt, 1, None)
        seen = {}
        for position in range(prompt, 150):
            group.plan_step(position, 1, 1, None)
            seen[position] = int(group.lengths[0, 1])
        segments = schedule(150, prompt, SMALL)
        assert segments[0].stop == prompt and segments[0].coded == 0
        covered = {p: s.coded for s in segments[1:] for p in range(s.start, s.stop)}
        assert covered == seen


def test_fidelity_of_exact_storage_is_perfect_and_of_lossy_storage_is_not(make_model):
    from pqlab.evaluation.fidelity import compare, summarize

    model = make_model("llama")
    books = Codebooks.random(model, pq=PQConfig(M=8, nbits=6))
    windows = [torch.randint(0, 200, (1, 120), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    frame = compare(model, windows, {"exact": lambda layer, k, v: (k, v), "pq": from_codebooks(books)}, SMALL)
    table = summarize(frame).set_index("method")
    assert table.positions.tolist() == [3 * 118] * 2
    assert table.kl["exact"] < 1e-6 and table.agreement["exact"] == 1 and abs(table.change["exact"]) < 1e-5
    assert table.kl["pq"] > 0.01 and table.kl_error["pq"] > 0 and table.worst_kl["pq"] > table.kl["pq"]
    early = frame[(frame.method == "pq") & (frame.coded == 0)]
    assert early.kl.max() < 1e-5, "positions that see no codes are exact"
    expected = torch.nn.functional.cross_entropy(model(windows[0]).logits[0, 1:-1], windows[0][0, 2:])
    assert frame[(frame.method == "pq") & (frame.window == 0)].exact_nll.mean() == pytest.approx(float(expected))
    assert model.config._attn_implementation == "sdpa"
