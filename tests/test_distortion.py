"""What codes lose, by head and of one vector; and the figures that draw it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from pqlab.config import PQConfig
from pqlab.evaluation.distortion import distortions, one_vector
from pqlab.figures.accuracy import positions_figure, retrieval_figure
from pqlab.figures.quantization import distortion_figure, rate_figure, subspaces_figure, vector_figure
from pqlab.quantization import Codebooks, Samples


@pytest.fixture
def books() -> Codebooks:
    return Codebooks.random(2, 3, 16, pq=PQConfig(8, 6), maps=True)


def test_distortion_is_the_share_of_the_variance(books):
    x = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0)) + 5
    codec = books.layer(0).v
    stored = codec.decode(codec.encode(x))  # decodes to itself: nothing is lost, whatever the mean
    table = distortions(books, Samples({0: x}, {0: stored}))
    assert table[["side", "head"]].values.tolist() == [[side, head] for side in "kv" for head in range(3)]
    lost = table.set_index(["side", "head"])
    assert (lost.head_space["v"] < 1e-4).all() and (lost.code_space["v"] < 1e-4).all()
    k = books.layer(0).k
    error = (k.decode(k.encode(x)) - x).square().sum((1, 2))
    variance = x.var(1, correction=0).sum(-1) * 50
    torch.testing.assert_close(torch.tensor(lost.head_space["k"].to_numpy()).float(), error / variance)
    assert (table.bits == 3).all()
    exact = Codebooks({1: books.layers[1]}, exact={0: (3, 16)})
    assert set(distortions(exact, Samples({0: x, 1: x}, {0: x, 1: x})).layer) == {1}


@pytest.mark.parametrize("head", [0, 2])
def test_one_vector_goes_the_codecs_way(books, head):
    codec = books.layer(1).k
    x = torch.randn(3, 1, 16)
    steps = one_vector(codec, x[head, 0], head)
    assert steps.code[::2].tolist() == codec.encode(x)[head, 0].tolist() and steps.subspace[:3].tolist() == [0, 0, 1]
    back = codec.decode(codec.encode(x))[head, 0]
    torch.testing.assert_close(torch.tensor(steps.decoded.to_numpy()), back)
    torch.testing.assert_close(torch.tensor(steps.error.to_numpy()), back - x[head, 0])


def test_figures_show_what_they_are_given(books):
    codec = books.layer(0).k
    x = torch.randn(3, 40, 16)
    y = codec.to_code_space(x)
    figure = subspaces_figure(x[1].numpy(), y[1].numpy(), codec.centroids[1].float().numpy(), [0, 5])
    centroids = [trace for trace in figure.data if trace.name == "centroids"]
    assert [len(trace.x) for trace in centroids] == [64, 64]
    assert centroids[1].y[7] == codec.centroids[1, 5, 7, 1]
    with pytest.raises(ValueError, match="choose M = d / 2"):
        subspaces_figure(x[1].numpy(), y[1].numpy(), torch.randn(4, 64, 4).numpy(), [0])

    table = distortions(books, Samples({0: x, 1: x}, {0: x, 1: x}))
    maps = distortion_figure(table).data
    assert [trace.name for trace in maps] == ["K", "V"] and maps[0].z.shape == (3, 2)
    assert maps[0].z[2][1] == table[(table.side == "k") & (table["head"] == 2) & (table.layer == 1)].code_space.item()

    rates = pd.DataFrame({"setting": ["a", "b", "a"], "bits": [2, 2, 1], "lost": [0.1, 0.2, 0.4]})
    assert list(rate_figure(rates).data[0].x) == [1, 2]
    named = {trace.name: trace for trace in vector_figure(one_vector(codec, x[0, 0])).data}
    assert named["vector"].y[3] == x[0, 0, 3]


def test_positions_and_what_was_found_are_drawn():
    ranges = pd.DataFrame(
        {"method": ["m", "m", "n"], "start": [0, 512, 0], "stop": [512, 1024, 512], "kl": [0.0, 0.1, 0.2]}
    )
    figure = positions_figure(ranges)
    assert list(figure.data[0].x) == [256, 768] and figure.data[0].y[0] > 0, "a logarithm of 0 is no place"
    cells = pd.DataFrame(
        {
            "method": ["exact", "exact", "exact", "pq"],
            "length": [512, 512, 1024, 512],
            "depth": 0.5,
            "found": [True, False, True, True],
        }
    )
    exact, pq = retrieval_figure(cells).data
    assert exact.z.tolist() == [[0.5, 1]] and list(exact.x) == ["512", "1024"] and pq.name == "pq"
    assert exact.text[0][0] == "50%"
