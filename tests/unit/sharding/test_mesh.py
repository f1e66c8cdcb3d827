"""Meshes in words, and the ranks that they name."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.errors import InputError
from distquant.sharding.mesh import AXES, Mesh

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
meshes = st.builds(Mesh, dp=st.integers(1, 4), ep=st.integers(1, 4), tp=st.integers(1, 4))


@PROPERTY
@given(meshes)
def test_ranks_are_numbered_with_tp_fastest(mesh):
    expected = itertools.product(range(mesh.dp), range(mesh.ep), range(mesh.tp))
    found = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert found == [{"dp": dp, "ep": ep, "tp": tp} for dp, ep, tp in expected]
    for rank, at in enumerate(found):
        assert rank == (at["dp"] * mesh.ep + at["ep"]) * mesh.tp + at["tp"]


@PROPERTY
@given(meshes, st.sampled_from(AXES))
def test_peers_partition_the_ranks(mesh, axis):
    groups = {mesh.peers(rank, axis) for rank in range(mesh.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    for group in groups:
        assert [mesh.coordinates(rank)[axis] for rank in group] == list(range(getattr(mesh, axis)))
        assert all(mesh.peers(rank, axis) == group for rank in group)
        for other in set(AXES) - {axis}:
            assert len({mesh.coordinates(rank)[other] for rank in group}) == 1


@PROPERTY
@given(meshes)
def test_words_read_back(mesh):
    assert Mesh.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
    ("text", "mesh", "words"),
    [
        ("tp=2", Mesh(tp=2), "tp=2"),
        (" dp = 2 , tp=4 ", Mesh(dp=2, tp=4), "dp=2,tp=4"),
        ("tp=2,ep=3", Mesh(ep=3, tp=2), "ep=3,tp=2"),
        ("tp=1", Mesh(), "tp=1"),
        (None, Mesh(), "tp=1"),
        (Mesh(dp=3), Mesh(dp=3), "dp=3"),
    ],
)
def test_parse(text, mesh, words):
    assert Mesh.parse(text) == mesh
    assert str(Mesh.parse(text)) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^mesh: '' in '' is not axis=size"),
        ("tp", r"'tp' in 'tp' is not axis=size"),
        ("0", r"'tp=0' in 'tp=0' is not axis=size of at least 1"),
        ("8,2", r"'8' in '8,2' is not axis=size"),
        ("tp=0", r"'tp=0' in 'tp=0' is not axis=size of at least 1"),
        ("tp=-1", r"'tp=-1'"),
        ("tp=2,", r"'' in 'tp=2,'"),
        ("tp=2,tp=4", r"'tp=4' in 'tp=2,tp=4' .*named once\. Write"),
        ("tpp=2", r"'tpp=2' .*did you mean 'tp'"),
        ("dp=2,xx=3", r"'xx=3' in 'dp=2,xx=3'.*axes are dp, ep, tp$"),
        ("TP=2", r"'TP=2'"),
        ("tp=2.0", r"'tp=2\.0'"),
    ],
)
def test_what_is_no_mesh(text, message):
    with pytest.raises(InputError, match=message):
        Mesh.parse(text)


@pytest.mark.parametrize("given", [8, "8", " 8 ", "08"])
def test_a_number_alone_is_that_of_tp(given):
    assert Mesh.parse(given) == Mesh(tp=8)


@pytest.mark.parametrize("given", [True, 8.0, "-8", -8])
def test_other_numbers_are_no_mesh(given):
    with pytest.raises(InputError, match="is not axis=size"):
        Mesh.parse(given)
