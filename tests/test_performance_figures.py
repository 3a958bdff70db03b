"""Shipped measurements come in one form, and their figures show them."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest

from pqlab.benchmarks.step_parts import PARTS
from pqlab.figures import performance
from pqlab.results.shipped import decode_frame, measured_with, model_frame, shipped, shipped_like


@pytest.mark.parametrize(
    "name",
    ["decode-h200", "decode-h100", *(f"cpu-2cores{of}" for of in ("", "-zen4", "-avx2", "-intel", "-intel-avx2"))],
)
def test_decode_results_have_one_form(name):
    result = shipped(name)
    frame = decode_frame(result, read_gb_per_s=10.0)
    assert len(frame) == sum("encode" not in r["case"] for r in result["records"])
    assert frame.notna().all().all() and (frame.speedup == frame.exact_microseconds / frame.microseconds).all()
    by_case = frame[(frame["shape"] == "32/8 d128") & (frame.bits == 4) & (frame.context == 32768) & ~frame.ragged]
    assert by_case.code_bytes.tolist() == [32768 * 8 * 64 * 2]
    assert measured_with(result).endswith(result.get("torch") or result["versions"]["torch"])
    ragged = frame[frame.ragged]
    assert len(ragged) == name.startswith("decode-") and (ragged.batch == 16).all()


def test_unknown_results_are_named():
    with pytest.raises(FileNotFoundError, match="decode-h200"):
        shipped("decode-a-gpu-nobody-has")


def test_model_results_know_what_everything_else_costs():
    gpu, cpu = model_frame(shipped("model-h200")), model_frame(shipped("cpu-2cores"))
    assert set(gpu.how) == {"graph", "compiled", "eager"} and set(cpu.how) == {"static buffers", "eager"}
    rest = gpu[gpu.case == "none"].set_index(["shape", "context", "how"]).milliseconds
    for row in gpu[gpu.how != "eager"].itertuples():
        assert row.rest_milliseconds == rest[row.shape, row.context, row.how]
    assert gpu[gpu.how == "eager"].rest_milliseconds.isna().all()


def test_a_case_keeps_what_is_behind_how_it_ran():
    cases = ["none", "exact eager", "exact eager, no cuDNN", "paged, no maps compiled"]
    rows = [{"shape": "7b", "context": 8, "case": case, "milliseconds": 1.0} for case in cases]
    frame = model_frame({"device": "NVIDIA H200", "records": rows})
    found = [("none", "graph"), ("exact", "eager"), ("exact, no cuDNN", "eager"), ("paged, no maps", "compiled")]
    assert list(zip(frame.case, frame.how, strict=True)) == found


def drawn(figure: go.Figure) -> dict[str, go.Figure]:
    assert all(axis.domain[0] < axis.domain[1] for axis in figure.select_xaxes())
    return {trace.name: trace for trace in figure.data}


def test_speedup_and_roofline_show_every_case():
    frame = decode_frame(shipped("decode-h200"))
    traces = drawn(performance.speedup_figure(frame))
    assert sum(len(t.x) for t in traces.values() if t.name != "as fast as exact") == len(frame)
    assert list(traces["32/32 d128, 4 bit"].y) == frame.speedup[:6].tolist()
    figure = performance.roofline_figure(frame)
    ours = [t for t in figure.data if t.name == "pqlab"]
    several = frame[(frame.batch == 1)].groupby(["shape", "bits"]).filter(lambda part: len(part) > 1)
    assert (
        len(ours) == several.groupby(["shape", "bits"]).ngroups == 5
        and list(ours[0].y) == frame.microseconds[:6].tolist()
    )
    unknown = decode_frame(shipped("cpu-2cores"))  # no read rate: drawn without
    assert performance.roofline_figure(unknown).data


def test_model_bars_add_up():
    frame = model_frame(shipped("model-h200"))
    figure = performance.model_figure(frame)
    for rest, over in zip(figure.data[::2], figure.data[1::2], strict=True):
        for name, a, b in zip(rest.y, rest.x, over.x, strict=True):
            case, _, how = name.rpartition(", ")
            assert ((frame.case == case) & (frame.how == how) & ((frame.milliseconds - a - b).abs() < 1e-9)).any()


def test_every_part_has_a_colour_of_its_own():
    assert set(performance.PART_COLOURS) == set(PARTS)
    assert len(set(performance.PART_COLOURS.values())) == len(PARTS)


def test_breakdown_and_orders_draw_their_records():
    rows = [("paged", 1024, "mlp", 3.0, 0.75), ("paged", 1024, "codes", 1.0, 0.25), ("exact", 1024, "mlp", 3.0, 1.0)]
    frame = pd.DataFrame(rows, columns=["kind", "context", "part", "milliseconds", "share"])
    traces = drawn(performance.breakdown_figure(frame))
    assert list(traces) == ["mlp", "codes"] and list(traces["mlp"].y) == [3.0, 3.0]
    assert list(traces["codes"].y) == [1.0, 0.0]  # a missing number would start the stack anew
    orders = pd.DataFrame(
        [
            {"what": "sum over codes", "order": order, "page_size": size, "microseconds": 1.0, "gb_per_s": 1.0, "share": 0.5}  # noqa: E501
            for order in ("tiled", "row_major, by token")
            for size in (16, 64)
        ]
        + [{"what": "decode", "case": "9/3", "page_size": 16, "microseconds": 1.0, "gb_per_s": 1.0, "share": 0.2}]
    )  # fmt: skip
    traces = drawn(performance.orders_figure(orders))
    assert list(traces) == ["tiled (pqlab)", "row-major, by token", "9/3"] and list(traces["9/3"].x) == ["16"]


@pytest.mark.parametrize("pattern", ["breakdown-*", "layout-*"])
def test_shipped_breakdowns_and_layouts_can_be_drawn(pattern):
    for result in shipped_like(pattern).values():
        frame = pd.DataFrame(result["records"])
        draw = performance.breakdown_figure if pattern.startswith("b") else performance.orders_figure
        assert draw(frame).data and result["commit"] and "+" not in result["commit"]
