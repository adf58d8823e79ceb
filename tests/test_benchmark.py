"""`bench`: the cases are the promised ones, its numbers mean what they say."""

import contextlib
import dataclasses
import functools
import io
import json
import statistics

import chex
import jax
import numpy as np
import pytest

from pallas_attn.benchmark import (
    measure,
    page,
    peers,
    programs,
    report,
    roofline,
    sweep,
    tables,
    timing,
    training_step,
)
from pallas_attn.benchmark.cases import CASES
from pallas_attn.benchmark.errors import sample_of
from pallas_attn.benchmark.inputs import draw, shapes_of
from pallas_attn.benchmark.peers import Peer, PEERS
from pallas_attn.benchmark.programs import ours, Side
from pallas_attn.benchmark.results import Result
from pallas_attn.benchmark.specs import (
    ALIBI,
    Case,
    CO_ALIBI,
    DENSE,
    RELATIVE,
    Target,
    Term,
)
from pallas_attn.benchmark.training_step import StepCase, STEPS, StepTarget
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.config import Block, Config
from pallas_attn.testing.numerics import assert_formula


FACTORED = Term("factored", rank=3)
FORGETTING = Term("forget")

# shape, peer, ratios of forward and forward + backward
PROMISED = {
    "B1 N16 T4096 H128 causal, no bias": ("cudnn", 1.10, 1.15),
    "B1 N16 T4096 H128 causal, no bias, a sink": ("no-sink", 1.02, 1.02),
    "B1 N16 T16384 H128 causal, no bias, a sink": ("no-sink", 1.02, 1.02),
    "B1 N16 T8192 H128, no bias, a mask of 10 % of blocks": ("no-mask", 0.25, 0.25),
    "B1 N16 T4096 H128 causal, table [1,16,4096] float32": ("cudnn", 1.3, 1.5),
    "B1 N16 T16384 H128 causal, table [1,16,16384] float32": ("cudnn", 1.3, 1.5),
    "B1 N16 T4096 H128 causal, ALiBi": ("cudnn", 0.70, 0.64),
    "B1 N16 T16384 H128 causal, ALiBi": ("cudnn", 0.37, 0.34),
    "B1 N16 T4096 H128 causal, ALiBi + factored R8": ("cudnn", 1.05, 0.84),
    "B1 N32 K8 T8192 H128 causal, ALiBi": ("cudnn", 0.60, 0.60),
    "B1 N16 T4096 H128 causal, Co-ALiBi": ("cudnn", 0.90, 0.95),
    "B1 N16 T4096 H128 float16 causal, Co-ALiBi": ("cudnn", 0.92, 0.95),
    "B1 N16 T4096 H128 causal, Co-ALiBi, nothing pruned": ("cudnn", 1.50, 1.70),
    "B1 N16 T16384 H128 causal, Co-ALiBi": ("cudnn", 0.45, 0.50),
    "B1 N16 T16384 H128 causal, Co-ALiBi, query x 4": ("cudnn", 0.75, 0.82),
    "B1 N16 T16384 H128 causal, Co-ALiBi, carries of 300 MiB": ("cudnn", 0.45, 0.54),
    "B1 N16 T16384 H128 causal, Co-ALiBi, query x 4, carries of 300 MiB": (
        "cudnn",
        0.75,
        0.86,
    ),
    "B1 N16 T32768 H128 causal, Co-ALiBi": ("cudnn", 0.26, 0.30),
    "B2 N8 T4096 H64 causal, Co-ALiBi": ("cudnn", 1.0, 1.05),
    "B1 N16 T4096 H128, dense [1,16,4096,4096]": ("cudnn-bias", 0.90, 0.62),
    "B2 N8 T4096 H64, dense [2,8,4096,4096]": ("cudnn-bias", 0.92, 0.52),
    "B2 N4 T4096 H32, dense [2,4,4096,4096]": ("cudnn-bias", 0.75, 0.48),
    "B384 N4 T384 H32, dense [1,4,384,384]": ("cudnn-bias", 0.65, 0.46),
    "B2 N4 T4096 H32, factored R8": ("cudnn-concatenation", 0.95, 0.95),
    "B2 N8 T8192 H64, factored R16": ("cudnn-concatenation", 1.0, 1.0),
    "B2 N4 T4096 H32, factored R8 float32": ("cudnn-concatenation", 1.6, 1.5),
    "B2 N8 T8192 H64, factored R16 float32": ("cudnn-concatenation", 1.9, 1.5),
    "B128 N4 T4096 H32, dense [1,4,4096,4096]": ("cudnn-bias", 0.75, 0.55),
    "B1 N8 T2048 H64 float32 causal, ALiBi": ("xla", 0.9, 0.6),
    "B1 N8 T2048 H64 float32 causal, dense [1,8,2048,2048]": ("xla", 0.9, 0.6),
    "B1 N16 T16384 H128 causal, gates 0.5 to 0.999": ("cudnn", 0.45, 0.45),
    "B2 N8 T4096 H64 causal, no bias, entmax 1.5": ("cudnn", 2.45, 1.40),
    "B1 N16 T16384 H64 causal, no bias, entmax 1.5": ("cudnn", 2.70, 1.20),
    "B1 N16 T16384 H64 causal, no bias, entmax 1.5, query x 9": ("cudnn", 2.10, 0.80),
    "B2 N8 T4096 H64 causal, ALiBi, entmax 1.5": ("cudnn", 1.30, 0.58),
    "B1 N16 T16384 H64 causal, ALiBi, entmax 1.5": ("cudnn", 0.52, 0.23),
    "B1 N16 T16384 H64 causal, no bias, entmax 1.5 top 32": ("cudnn", 2.50, 1.07),
    "B1 N16 T16384 H64 causal, no bias, entmax 1.5 top 8": ("cudnn", 2.00, 0.70),
    "B2 N8 T4096 H64 causal, no bias, entmax 2.0": ("cudnn", 2.90, 1.60),
    "B2 N8 T4096 H64 causal, dense [1,8,4096,4096], entmax 1.5": ("cudnn", 4.50, 3.70),
}


def small(name: str, **changes: object) -> Case:
    here = "gpu" if measure.on_gpu() else "cpu"
    base = Case(name, "here", B=2, N=4, T=40, H=16, dtype="float32", platform=here)
    return dataclasses.replace(base, **{"peer": "xla", **changes})


SMALL = (
    small("alibi", K=2, causal=True, bias=(ALIBI,), target=Target(2.0, 2.0, 64.0)),
    small("sum", causal=True, bias=(ALIBI, FACTORED)),
    small("shared", bias=(Term("dense", shared=True),)),
    small("co-alibi", K=2, causal=True, bias=(CO_ALIBI,), peer=None),
    small("forget", K=2, causal=True, bias=(FORGETTING,)),
    small("relative", causal=True, bias=(RELATIVE,)),
    small("sink", causal=True, sink=True, peer="no-sink"),
    small("bigbird", T=256, mask="bigbird", peer="no-mask"),
)
SMALL_STEP = StepCase(
    "gpt",
    "here",
    B=2,
    N=2,
    T=40,
    H=16,
    layers=2,
    vocabulary=11,
    dtype="float32",
    peer="xla",
    target=StepTarget(attention=1e3, step=1e3, memory_share=1e3),
    platform="gpu" if measure.on_gpu() else "cpu",
)


def test_the_promised_cases_are_there():
    found = {
        case.shape: (case.peer, case.target.forward, case.target.both)
        for case in CASES
        if case.target
    }
    assert found == PROMISED


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_well_formed(case):
    assert [other.name for other in CASES].count(case.name) == 1
    assert case.origin
    assert case.peer in (*PEERS, None)
    assert case.N % case.key_heads == 0
    shapes = shapes_of(case)
    assert shapes.query.shape == (case.B, case.T, case.N, case.H)
    assert shapes.value.shape == (case.B, case.T, case.key_heads, case.H)
    assert (shapes.bias is None) == (not case.bias)
    assert {x.dtype.name for x in shapes[:3]} == {case.dtype}


def test_memory_is_promised_where_an_implementation_could_need_much():
    found = {
        case.name: case.target.temporaries_mib
        for case in CASES
        if case.target and case.target.temporaries_mib
    }
    assert found == {
        "af3": 64,
        "relative-4k": 8,
        "co-alibi-4k": 40,
        "co-alibi-4k-float16": 40,
        "co-alibi-4k-unpruned": 40,
        "co-alibi-h64": 40,
        "co-alibi-16k": 530,
        "co-alibi-16k-q4": 530,
        "co-alibi-16k-300mib": 318,
        "co-alibi-16k-q4-300mib": 318,
        "co-alibi-32k": 800,
    }
    (case,) = (case for case in CASES if case.name == "af3")
    assert jax.tree.leaves(shapes_of(case).bias)[0].shape == (1, 4, 4096, 4096)


@pytest.mark.parametrize(
    ("case", "attend"),
    [
        (small("none", causal=True), peers.plain),
        (small("dense", bias=(DENSE,)), peers.with_bias),
        (small("alibi", bias=(ALIBI,), causal=True), peers.with_bias),
        (small("factored", bias=(FACTORED,)), peers.concatenation),
    ],
    ids=lambda x: getattr(x, "name", getattr(x, "__name__", "")),
)
def test_a_peer_computes_the_case(case, attend):
    """By jax.nn's other backend, which runs anywhere."""
    inputs = draw(case, jax.random.key(1))
    its = lambda *x: attend(*x[:4], causal=case.causal, backend="xla")
    with jax.default_matmul_precision("highest"):
        want = jax.jit(ours(case, "reference").both)(inputs)
        assert_formula(jax.jit(Side(its).both)(inputs), want)


def test_a_case_scales_its_queries_and_chooses_a_config(monkeypatch):
    case = small("plain", bias=(CO_ALIBI,))
    config = Config(prune=False)
    changed = dataclasses.replace(case, query_factor=4.0, config=config)
    one, other = (draw(x, jax.random.key(0)) for x in (case, changed))
    chex.assert_trees_all_equal(other, one._replace(query=4 * one.query))
    given = []

    def attention(*operands, config, **options):
        given.append(config)
        return operands[0]

    monkeypatch.setattr(programs, "dot_product_attention", attention)
    another = Config(forward=Block(64, 64))
    for side in (
        ours(case, "xla"),
        ours(changed, "xla"),
        ours(changed, "xla", another),
    ):
        side.forward(one)
    assert given == [None, config, another]
    assert changed.shape == f"{case.shape}, query x 4, nothing pruned"


def test_the_slopes_of_all_batch_entries_are_checked_together():
    case = small("co-alibi", bias=(CO_ALIBI,))
    assert sample_of(case).batch == (0, 1)


def test_a_concatenation_is_filled_to_eight_columns(monkeypatch):
    widths = []

    def attention(query, key, value, **options):
        widths.extend(x.shape[3] for x in (query, key, value))
        return value

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    case = small("factored", bias=(FACTORED,))
    query, key, value, bias = draw(case, jax.random.key(0))[:4]
    assert isinstance(bias, FactoredBias)
    output = peers.concatenation(query, key, value, bias, causal=False)
    assert widths == [24, 24, 24]
    assert output.shape[3] == case.H


def test_a_timing_is_the_median_of_its_repeats():
    seconds = [0.4, 0.1, 0.3, 0.2, 9.0]
    found = timing.summary(seconds, calls=10, host=0.001)
    assert found.median == 1e3 * statistics.median(seconds) / 10
    assert (found.low, found.high) == (10.0, 900.0)
    assert (found.repeats, found.calls, found.host) == (5, 10, 1.0)


@pytest.mark.parametrize("queued", [False, True])
def test_programs_are_timed_in_turns(queued):
    order = []

    def broken():
        raise RuntimeError("out of memory")

    calls = {
        "a": lambda: order.append("a"),
        "broken": broken,
        "b": lambda: order.append("b"),
    }
    found = timing.interleaved(calls, queued=queued, repeats=4)
    assert found["broken"] == timing.Failure("RuntimeError: out of memory")
    for name in "ab":
        time = found[name]
        assert isinstance(time, timing.Timing)
        assert time.repeats == 4
        assert time.low <= time.median <= time.high
    if not queued:
        assert "".join(order) == "aabb" + "abba" * 2


def test_a_long_program_runs_once(monkeypatch):
    monkeypatch.setattr(timing, "LONG_SECONDS", 0.0)
    runs = []
    found = timing.interleaved({"long": lambda: runs.append(1)}, queued=False)["long"]
    assert isinstance(found, timing.Timing)
    assert found.repeats == len(runs) == 1


def test_the_floor_is_the_slower_of_products_and_memory():
    device, work = roofline.Device(flops=1e12, bytes=1e9), roofline.Work(4e9, 8e6)
    assert work.floor_ms(device) == 8.0
    assert work.peak_share(device, milliseconds=16.0) == 0.25


def test_rates_are_of_the_square_and_of_its_causal_half():
    case = small("causal", causal=True)
    square = 4 * case.B * case.N * case.T**2 * case.H / 1e12
    forward = roofline.tflops(case, "forward", milliseconds=1e3)
    assert forward == pytest.approx({"full": square, "causal": square / 2})
    both = roofline.tflops(small("full"), "both", milliseconds=0.5e3)
    assert both == pytest.approx({"full": 7 * square})


def test_a_failed_compilation_does_not_lose_the_others():
    def broken():
        raise ValueError("no such kernel")

    seen = {}
    found = timing.compile_all({"good": lambda: 1, "bad": broken}, seen.__setitem__)
    assert (
        found
        == seen
        == {"good": 1, "bad": timing.Failure("ValueError: no such kernel")}
    )


def test_work_is_that_of_the_visible_pairs():
    case = small("none", K=2, causal=True)
    seen = sum(j <= i for i in range(case.T) for j in range(case.T))
    assert roofline.pairs(case) == case.B * case.N * seen
    work = roofline.forward(case)
    assert work.flops == 4 * case.B * case.N * seen * case.H
    elements = case.B * case.T * case.H * (2 * case.N + 2 * case.key_heads)
    assert work.bytes == 4 * elements
    assert roofline.device("NVIDIA H100 80GB HBM3") == roofline.DEVICES["H100"]
    assert roofline.device("cpu") is None


def test_a_sample_has_whole_groups_of_heads():
    grouped = sample_of(small("alibi", N=8, K=4))
    assert grouped.key_heads == (0, 3)
    assert grouped.heads == (0, 1, 6, 7)
    assert grouped.batch == (0,)
    assert sample_of(small("shared", bias=(Term("dense", shared=True),))).batch == (
        0,
        1,
    )
    assert sample_of(small("multi-query", K=1)).heads == (0, 1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report of all small cases, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "deep" / "report.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert report.main(["--json", str(path), "--repeats", "2"], SMALL) == 0
    return path, printed.getvalue()


def test_a_run_measures_every_case(run):
    found = json.loads(run[0].read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"]["kind"] == jax.devices()[0].device_kind
    results = [Result.of_json(values) for values in found["results"]]
    assert [result.name for result in results] == [case.name for case in SMALL]
    for result, case in zip(results, SMALL, strict=True):
        assert not result.failures
        sides = {"ours", "peer"} if case.peer else {"ours"}
        programs = {f"{side} {work}" for side in sides for work in ("forward", "both")}
        for work in ("forward", "both"):
            assert ((result.ratio(work) or 0) > 0) == ("peer" in sides)
        assert set(result.timings) == set(result.temporaries) == programs
        assert set(result.tflops) == programs
        median = result.timings["ours both"].median
        assert result.tflops["ours both"] == roofline.tflops(case, "both", median)
        assert min(result.temporaries.values()) > 0
        assert set(result.visited) == {"forward", "rows", "cols"}
        assert set(result.errors) == sides
    assert results[0].met()["temporaries_mib"]


def within_formula(errors):
    """Relative errors are those of float32; TF32, a GPU's default, is coarser."""
    errors = np.asarray(list(errors))
    assert np.isfinite(errors).all()
    if not measure.on_gpu():
        assert_formula(1 + errors, np.ones_like(errors))


def test_errors_are_of_the_output_and_every_gradient(run):
    results = json.loads(run[0].read_text())["results"]
    leaves = {result["name"]: set(result["errors"]["ours"]) for result in results}
    always = {"output", "query", "key", "value"}
    assert leaves == {
        "alibi": always | {"slopes"},
        "sum": always | {"slopes", "q_factor", "k_factor"},
        "shared": always | {"bias"},
        "co-alibi": always | {"slopes"},
        "forget": always | {"log_gate"},
        "relative": always | {"table"},
        "sink": always | {"sink"},
        "bigbird": always,
    }
    for result in results:
        for side in result["errors"].values():
            within_formula(side.values())


def test_the_tables_show_every_case(run, capsys):
    report.main(["--markdown", str(run[0])])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(SMALL)
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    results = [Result.of_json(x) for x in json.loads(run[0].read_text())["results"]]
    tables.terminal(tables.HEAD, [tables.cells(result) for result in results])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [case.name for case in SMALL]


@pytest.mark.parametrize(
    ("option", "file"), [("--markdown", "README.md"), ("--picture", "speed.svg")]
)
def test_the_committed_page_is_what_the_command_makes(option, file, capsys):
    assert report.main([option]) == 0
    assert (page.FOLDER / file).read_text() == capsys.readouterr().out


def test_the_page_has_every_case_that_was_measured():
    reports = page.committed()
    assert {f"{x}.json" for x in reports} == {
        path.name for path in page.FOLDER.glob("*.json")
    }
    results = [
        Result.of_json(values)
        for found in reports.values()
        for values in (*found["results"], *found.get("steps", ()))
    ]
    short, lost, *others = page.page(reports).split("\n## ")[1:]
    assert len(short.split("| `")) - 1 == len(page.SHORT) <= 8
    for result in results:
        assert sum(f"| `{result.name}` |" in x for x in others) == 1
        assert (f"| `{result.name}` |" in lost) == result.lost()
    # what is said in short hides no kind of loss
    assert any(result.lost() for result in results if result.name in page.SHORT)


def test_a_case_is_lost_where_the_peer_is_faster_or_a_target_is_missed():
    def result(ours, peer, target):
        time = {"ours forward": ours, "peer forward": peer}
        timings = {x: timing.Timing(t, t, t, 1, 1, 0.0) for x, t in time.items()}
        return Result("a", "b", "c", "d", {"forward": target}, timings)

    assert not result(1.0, 2.0, 0.5).lost()
    assert result(1.0, 2.0, 0.4).lost()
    assert result(2.0, 1.0, 3.0).lost()


def test_progress_and_the_platform_are_said(run):
    text = run[1]
    assert ("CPU cases only" in text) != measure.on_gpu()
    assert "compiled 61 of 61 programs" in text
    of = len(SMALL)
    assert all(f"[{i}/{of}] {case.name}: " in text for i, case in enumerate(SMALL, 1))


def test_a_peer_without_the_bias_is_judged_by_its_own_truth(monkeypatch, tmp_path):
    plain = functools.partial(peers.plain, backend="xla")
    monkeypatch.setitem(PEERS, "xla", Peer("no bias", plain, biased=False))
    path = tmp_path / "report.json"
    assert report.main(["alibi", "--json", str(path), "--repeats", "1"], SMALL) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["errors"]["peer"]) == {"output", "query", "key", "value"}
    within_formula(result["errors"]["peer"].values())


def test_a_failing_case_leaves_the_others(tmp_path, capsys):
    path = tmp_path / "report.json"
    broken = small("broken", bias=(DENSE,))
    broken = dataclasses.replace(broken, peer="cudnn-concatenation")
    arguments = ["--json", str(path), "--repeats", "1"]
    assert report.main(arguments, (broken, small("none"))) == 1
    first, second = json.loads(path.read_text())["results"]
    assert set(first["failures"]) == {"peer forward", "peer both"}
    assert first["timings"]["ours both"]["median"] > 0
    assert not second["failures"]
    assert "peer forward, peer both" in capsys.readouterr().out


@pytest.fixture(scope="module")
def step_run(tmp_path_factory):
    """The report of a small training step, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["gpt", "--json", str(path), "--repeats", "1"]
        assert report.main(arguments, (*SMALL, SMALL_STEP)) == 0
    return path, printed.getvalue()


def test_a_training_step_is_promised_at_4k():
    (case,) = (case for case in STEPS if case.platform == "gpu")
    assert case.shape == (
        "B4 N16 T4096 H64 bfloat16, GPT of 4 layers, 8192 tokens, ALiBi"
    )
    assert case.peer == "cudnn"
    assert case.target == StepTarget(attention=0.4, step=1.0, memory_share=1.0)
    assert report.selected((*CASES, *STEPS), ["gpt-*"], "gpu") == [case]


def test_both_models_of_a_training_step_have_the_same_gradients(step_run):
    """And both are near the truth, so that neither has lost its bias."""
    found = json.loads(step_run[0].read_text())
    assert found["results"] == []
    (result,) = map(Result.of_json, found["steps"])
    assert not result.failures
    assert set(result.errors) == {"ours", "peer"}
    for errors in result.errors.values():
        leaves = {leaf.rpartition("/")[0].rpartition("/")[2] for leaf in errors}
        assert {"query", "key", "value", "out"} <= leaves
        within_formula(errors.values())


def test_a_training_step_has_times_memory_and_targets(step_run):
    path, text = step_run
    (values,) = json.loads(path.read_text())["steps"]
    result = Result.of_json(values)
    programs = {f"{side} {work}" for side in ("ours", "peer")
                for work in ("attention", "step")}  # fmt: skip
    assert set(result.timings) == set(result.memory) == programs
    assert result.memory["ours step"] > result.temporaries["ours step"] > 0
    assert result.met() == {"attention": True, "step": True, "memory_share": True}
    assert "[1/1] gpt: attention " in text
    assert "3 of 3 targets met." in text
    assert "(<= 1000.00: met)" in tables.markdown(json.loads(path.read_text()))


def test_a_bias_that_is_lost_is_found(monkeypatch, tmp_path):
    def attend(query, key, value, bias, **options):
        return peers.plain(query, key, value, None, **options)

    monkeypatch.setattr(peers, "with_bias", attend)
    path = tmp_path / "report.json"
    report.main(["gpt", "--json", str(path), "--repeats", "1"], (SMALL_STEP,))
    (values,) = json.loads(path.read_text())["steps"]
    errors = values["errors"]
    assert max(errors["peer"].values()) > 0.01
    swapped = {"ours": errors["peer"], "peer": errors["ours"]}
    assert "query/kernel" in training_step._inaccurate(SMALL_STEP, swapped)


def test_a_training_step_has_no_blocks_to_sweep(capsys):
    with pytest.raises(SystemExit):
        report.main(["gpt", "--sweep", "rows=16x16x4x1"], (SMALL_STEP,))
    assert "--sweep needs a case of attention" in capsys.readouterr().err


def test_gates_run_from_a_half_to_all_but_a_thousandth():
    case = small("forget", N=4, bias=(FORGETTING,))
    (log_gate,) = jax.tree.leaves(draw(case, jax.random.key(0)).bias)
    assert log_gate.shape == (case.B, case.T, 4)
    assert np.exp(log_gate[0, 0, [0, 3]]) == pytest.approx([0.5, 0.999])
    assert (np.diff(log_gate[0, 0]) > 0).all()


def test_a_tenth_of_all_blocks_is_shown():
    case = small("bigbird", T=2048, mask="bigbird")
    mask = np.asarray(draw(case, jax.random.key(0)).mask)
    blocks = mask.reshape(32, 64, 32, 64)
    np.testing.assert_array_equal(blocks.any((1, 3)), blocks.all((1, 3)))
    # two rows, two columns and those around the diagonal alone are more at this length
    assert mask.mean() == pytest.approx((4 * 32 - 4 + 3 * 30 - 6) / 32**2, abs=0.01)


def test_cases_are_selected_by_name_and_platform():
    here = report.selected(CASES, [], "cpu")
    assert {case.name for case in here} == {"cpu-alibi", "cpu-dense"}
    assert len(report.selected(CASES, [], "gpu")) == 44
    named = report.selected(CASES, ["dense-*", "af3", "cpu-*"], "gpu")
    assert [x.name for x in named] == ["dense-h128", "dense-h64", "dense-h32", "af3"]
    assert [x.name for x in report.selected(CASES, ["*-32k"], "cpu")]


def test_a_sweep_times_each_block(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["alibi", "--repeats", "1", "--json", str(path)]
    arguments += ["--sweep", "forward=32x32x4x2,64x32x4x3", "--sweep", "rows=16x16x4x1"]
    arguments += ["--sweep", "tangent=16x16x4x1"]
    assert report.main(arguments, SMALL) == 0
    trials = [sweep.Trial(**x) for x in json.loads(path.read_text())["sweep"]]
    assert sorted((t.work, t.name) for t in trials) == [
        ("both", "rows=16x16x4x1"),
        ("both", "shipped"),
        ("forward", "forward=32x32x4x2"),
        ("forward", "forward=64x32x4x3"),
        ("forward", "shipped"),
        ("tangents", "shipped"),
        ("tangents", "tangent=16x16x4x1"),
    ]
    if not measure.on_gpu():  # "xla" has no blocks
        assert {trial.difference for trial in trials} == {0.0}


@pytest.mark.parametrize("text", ["rows", "rows=", "rows=1", "rows=axb", "top=1x2x3x4"])
def test_a_sweep_that_cannot_be_read_says_how(text):
    with pytest.raises(ValueError, match="--sweep"):
        sweep.parsed(text)


def test_a_sweep_names_a_pass_and_its_blocks():
    assert sweep.parsed("cols=64x32x4x2,32x32x2x1") == [
        ("cols", Block(64, 32, 4, 2)),
        ("cols", Block(32, 32, 2, 1)),
    ]
