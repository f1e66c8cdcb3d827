"""`generate` where ranks differ in their clocks, criteria, processors and streamers: they decide together, or refuse."""

from __future__ import annotations

import generating
import pytest
import work

BEAMS = {"num_beams": 3, "do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 0}
GREEDY = {"do_sample": False}
MODES = pytest.mark.parametrize("kwargs", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])


def same(found: list) -> bool:
    return all(one == found[0] for one in found)


@MODES
@pytest.mark.parametrize("late", [0, 1])
def test_ranks_stop_at_the_same_token_though_their_clocks_differ(ranks, model_of, kwargs, late):
    """The time of one rank is over at the first token, that of the other in an hour."""
    times = [1e-9 if rank == late else 3600.0 for rank in range(2)]
    assert ranks.run(2, generating.own_deadline, model_of("llama-gqa"), "tp=2", times, kwargs) == [1, 1]


@MODES
@pytest.mark.parametrize("stopping", [[0], [1], [0, 1]])
def test_criterion_of_some_ranks_stops_all(ranks, model_of, kwargs, stopping):
    path = model_of("llama-gqa")
    found = ranks.run(2, generating.own_criterion, path, "tp=2", stopping, kwargs)
    assert same(found)
    if kwargs is GREEDY:
        alone = ranks.run(1, generating.own_criterion, path, "tp=1", [0], kwargs)[0]
        assert found[0] == alone
        assert found[0][1][-1] == 0, "the second is padded once it is done"


@MODES
def test_processors_that_differ_count_as_rank_0s(ranks, model_of, kwargs):
    path = model_of("llama-gqa")
    found = ranks.run(2, generating.own_processor, path, "tp=2", kwargs)
    assert same(found)
    if kwargs is GREEDY:
        assert found[0] == ranks.run(1, generating.own_processor, path, "tp=1", kwargs)[0]


def test_streamer_of_one_rank_hears_every_token(ranks, model_of):
    (answer, heard), (other, nothing) = ranks.run(2, generating.streamer_of_rank_0, model_of("llama-gqa"), "tp=2")
    assert answer == other == heard
    assert nothing == []


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_assisted_generation_agrees(ranks, model_of, mode):
    path, kwargs = model_of("llama-gqa"), {"max_new_tokens": 12, **mode}
    found = ranks.run(2, generating.assisted, path, "tp=2", kwargs)
    assert same(found)
    if mode is GREEDY:
        assert found[0] == generating.assisted(path, None, kwargs)


def test_drafts_of_an_assistant_end_together(ranks, model_of):
    """`max_time` holds for a draft too: the slow rank's would be shorter than the other's."""
    kwargs = {"max_new_tokens": 30, "min_new_tokens": 30, "max_time": 0.12, **GREEDY}
    assert same(ranks.run(2, generating.assisted, model_of("llama-gqa"), "tp=2", kwargs, 1))


@pytest.mark.parametrize(
    "own",
    [
        [{}, {"inputs": [[5, 17, 99], [3, 4, 2]]}],
        [{}, {"inputs": [list(reversed(row)) for row in work.IDS]}],
        [{"num_beams": 2}, {}],
        [{"max_new_tokens": 4}, {"max_new_tokens": 5}],
    ],
    ids=["shape", "tokens", "beams", "length"],
)
def test_different_prompts_and_options_are_refused_on_all_ranks(ranks, model_of, own):
    path = model_of("llama-gqa")
    for told, afterwards in ranks.run(2, generating.own_arguments, path, "tp=2", own):
        assert "generate: ranks that hold parts of one model were given different prompts or options. Give" in told
        assert len(afterwards) == 2


def test_deadline_of_each_rank_is_its_own(ranks, model_of):
    own = [{"max_time": 50.0}, {"max_time": 60.0}]
    assert [told for told, _ in ranks.run(2, generating.own_arguments, model_of("llama-gqa"), "tp=2", own)] == ["", ""]


def test_tokens_that_differ_are_told_on_all_ranks(ranks, model_of):
    for told in ranks.run(2, generating.drawing_alone, model_of("llama-gqa"), "tp=2"):
        assert "ranks that hold parts of one model chose different tokens" in told


@pytest.mark.parametrize("lengths", [[3, 9], [9, 3]])
def test_batch_that_is_done_waits_for_the_other(ranks, moe_of, lengths):
    """With `all_to_all` each rank has a batch of its own, and experts that the other's tokens need."""
    for found, alone in ranks.run(2, generating.own_batches, moe_of("mixtral"), "ep=2", lengths):
        assert found == alone


def test_continuous_batching_is_refused(ranks, model_of):
    for told in ranks.run(2, generating.continuous, model_of("llama-gqa"), "tp=2"):
        assert len(told) == 2
        assert all("continuous batching" in one for one in told)
