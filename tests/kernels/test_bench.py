"""The benchmark's arithmetic by hand, its clock replaced by a counted one; and that only right answers are ranked."""

import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention import packed_scale_attention, scale_attention
from pallas_kernels.scale_attention.bench import cases, peers, table, times

pytestmark = pytest.mark.usefixtures("quick_compilation")
RATES = times.Rates(copy=1e9, matmul=1e10)


def setting(sides=(1, 2), batch=2, heads=3, size=8, dtype="float32", pattern="block_diagonal", norm=False):
    return cases.Setting(ScaleLadder(sides), batch, heads, size, dtype, pattern, norm)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles fast rather than fast code."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def untimed(monkeypatch):
    """Every time is a millisecond, and nothing is run for it."""
    monkeypatch.setattr(times, "time_calls", lambda call, wait, repeats: times.Time(1e-3, 1e-3, 1e-3))


class TestWork:
    @pytest.mark.parametrize(
        ("pixels", "batch", "heads", "gigaflops"), [(256, 64, 16, 29.0), (512, 16, 24, 149.6), (1024, 2, 24, 302.1)]
    )
    def test_the_published_settings_have_the_published_flops(self, pixels, batch, heads, gigaflops):
        published = setting(ScaleLadder.preset(pixels).sides, batch, heads, 64)
        assert published.flops("forward") / 1e9 == pytest.approx(gigaflops, abs=0.05)

    @pytest.mark.parametrize(("pattern", "pairs"), [("block_diagonal", 1 + 16 + 81), ("block_causal", 1 + 20 + 9 * 14)])
    def test_visible_pairs_are_counted_once(self, pattern, pairs):
        ladder = setting((1, 2, 3), pattern=pattern)
        assert ladder.pairs == pairs == ladder.visible(14).sum()
        assert ladder.flops("forward") == 4 * 2 * 3 * 8 * pairs
        assert ladder.flops("both") == 3.5 * ladder.flops("forward")

    @pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
    def test_bytes_are_four_tensors_forward_and_eight_backward(self, dtype, itemsize):
        tensor = 2 * 5 * 3 * 8 * itemsize
        found = [setting(dtype=dtype).least_bytes(name) for name in times.PASSES]
        assert found == [4 * tensor, 8 * tensor, 12 * tensor]

    def test_the_bound_is_the_slower_of_bytes_and_flops(self):
        small, large = setting(), setting((1, 9))
        assert RATES.bound(small, "forward") == small.least_bytes("forward") / 1e9 > small.flops("forward") / 1e10
        assert RATES.bound(large, "forward") == large.flops("forward") / 1e10 > large.least_bytes("forward") / 1e9
        both = RATES.bound(large, "forward") + RATES.bound(large, "backward")
        assert RATES.bound(large, "both") == pytest.approx(both)

    def test_padding_sees_itself_alone(self):
        mask = setting((1, 2)).visible(8)
        blocks = [slice(0, 1), slice(1, 5), slice(5, 8)]
        expected = np.zeros((8, 8), bool)
        for block in blocks:
            expected[block, block] = True
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(setting((1, 2)).visible(8, jnp), expected)


class TestClock:
    @pytest.fixture
    def clock(self, monkeypatch):
        """Seconds that pass only where a test says so."""
        now = [0.0]
        monkeypatch.setattr(times.time, "perf_counter", lambda: now[0])
        return now

    def test_an_accelerators_queue_is_filled_and_waited_for_once_a_repeat(self, clock, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        log = []

        def wait(_):
            clock[0] += 1e-3 * sum(1 for _ in itertools.takewhile(lambda what: what == "call", reversed(log)))
            log.append("wait")

        taken = times.time_calls(lambda: log.append("call"), wait, repeats=3)
        assert taken == times.Time(*[pytest.approx(1e-3)] * 3)
        repeat = ["call"] * 20 + ["wait"]  # 20 ms at a millisecond a call
        assert log == ["call", "wait"] * 2 + repeat * 4  # two to warm up, one uncounted

    def test_a_cpu_is_waited_for_after_each_call(self, clock):
        log = []

        def wait(_):
            clock[0] += 1e-2
            log.append("wait")

        assert times.time_calls(lambda: log.append("call"), wait, repeats=2).median == pytest.approx(1e-2)
        assert log == ["call", "wait"] * (len(log) // 2)

    def test_the_median_and_the_quartiles_are_of_the_counted_repeats(self, clock):
        seconds = iter([9, 9, 9, 5, 1, 2, 3, 4])  # compilation, a look, the clocks' coming up, then five

        def wait(_):
            clock[0] += next(seconds)

        assert times.time_calls(lambda: None, wait, repeats=5) == times.Time(3, 2, 4)

    def test_one_repeat_has_no_spread(self, clock):
        def wait(_):
            clock[0] += 2

        assert times.time_calls(lambda: None, wait, repeats=1) == times.Time(2, 2, 2)


@pytest.mark.parametrize(("pattern", "norm"), [("block_diagonal", False), ("block_causal", True)])
def test_the_truth_is_the_dense_references(pattern, norm):
    case = cases.make_case(setting((1, 2, 3), pattern=pattern, norm=norm))

    def attend(*operands):
        options = {"q_scale": operands[3]} if norm else {}
        return scale_attention(
            *operands[:3], case.setting.ladder, pattern=pattern, implementation="reference", **options
        )

    out, pull = jax.vjp(attend, *case.operands)
    expected = [out, *pull(case.cotangent)]
    assert len(case.truth) == len(expected) == 4 + norm
    for truth, array in zip(case.truth, expected, strict=True):
        assert times.error_of(array, truth) < 1e-6


def test_right_implementations_are_found_right(untimed):
    chosen = setting((1, 2, 3), dtype="bfloat16", norm=True)
    rows = list(times.measure_all(chosen, ["reference", "xla"], [], 1))
    assert [row.name for row in rows] == ["reference", "xla"]
    for row in rows:
        assert (row.absent, row.right, set(row.times)) == (None, True, set(times.PASSES))
        assert list(row.errors) == ["output", "gradients", "q_scale"]
        assert row.default == (row.name == "xla")  # on a CPU
        assert row.extra_bytes >= 4 * 2 * 14 * 3 * 8 * 2  # output and three gradients


def without_keys(q, k, v, ladder, **options):
    return scale_attention(q, jax.lax.stop_gradient(k), v, ladder, **options)


def not_finite(q, *args, **options):
    return q * jnp.inf


WRONG = {
    "other values": lambda q, k, v, ladder, **options: 1.1 * scale_attention(q, k, v, ladder, **options),
    "other gradients": without_keys,
    "not finite": not_finite,
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_shown_and_not_ranked(untimed, monkeypatch, case):
    chosen = setting((1, 2, 3))
    [slow] = times.measure_all(chosen, ["reference"], [], 1)
    monkeypatch.setattr(times, "scale_attention", WRONG[case])
    monkeypatch.setattr(times, "time_calls", lambda *_: times.Time(1e-9, 1e-9, 1e-9))
    [fast] = times.measure_all(chosen, ["xla"], [], 1)
    assert (fast.absent, fast.right) == (None, False)
    assert (fast.errors["output"] < 1e-6) == (case == "other gradients")
    rows = [fast, slow]
    assert table.ranked(rows) == [slow, fast]
    assert table.ours_at_best(rows, "forward") == 1e-3
    [line] = [line for line in table.render(chosen, rows, RATES).splitlines() if line.startswith("xla")]
    assert line.split().count("wrong") == 3
    json.dumps(table.as_json(chosen, rows, RATES), allow_nan=False)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "highest"), ("bfloat16", None)])
def test_products_of_float32_are_exact_on_accelerators_too(untimed, dtype, precision):
    seen = []

    def start(case):
        seen.append(jax.config.jax_default_matmul_precision)
        return peers.JaxProgram(lambda *qkv: qkv[0], case)

    times.measure("it", start, cases.make_case(setting(dtype=dtype)), 1, ours=False)
    assert seen == [precision]


def as_xla(attend):
    """A kernel's door, where the kernel is not."""
    return lambda *args, implementation, **options: attend(*args, implementation="xla", **options)


@pytest.mark.parametrize("norm", [False, True])
def test_a_kernel_is_measured_with_a_packed_projection_too(untimed, monkeypatch, norm):
    for attend in (scale_attention, packed_scale_attention):
        monkeypatch.setattr(times, attend.__name__, as_xla(attend))
    monkeypatch.setattr(times, "choose", lambda q, length: "hopper")
    rows = list(times.measure_all(setting((1, 2, 3), norm=norm), ["xla", "hopper"], [], 1))
    assert [(row.name, row.right, row.default) for row in rows] == [
        ("xla", True, False),
        ("hopper", True, True),
        ("hopper, packed", True, True),
    ]
    assert max(rows[2].errors.values()) < 1e-5


def test_a_wrong_gradient_of_a_packed_projection_is_found(untimed, monkeypatch):
    def without_values(qkv, ladder, **options):
        frozen = jnp.concatenate([qkv[:, :, :2], jax.lax.stop_gradient(qkv[:, :, 2:])], axis=2)
        return packed_scale_attention(frozen, ladder, **options)

    monkeypatch.setattr(times, "scale_attention", as_xla(scale_attention))
    monkeypatch.setattr(times, "packed_scale_attention", as_xla(without_values))
    _, packed = times.measure_all(setting((1, 2)), ["hopper"], [], 1)
    assert (packed.right, packed.errors["gradients"]) == (False, pytest.approx(1))


def peer(make, program=peers.JaxProgram):
    return peers.Peer(("cpu",), program, make)


class TestPeers:
    @pytest.mark.parametrize(
        ("make", "pattern", "norm"),
        [
            (peers.cudnn_mask, "block_diagonal", True),
            (peers.cudnn_per_scale, "block_causal", True),
            (peers.cudnn_per_scale, "block_diagonal", False),
            (peers.splash, "block_causal", False),
        ],
    )
    def test_what_surrounds_the_kernels_in_jax_is_right_at_odd_lengths(self, untimed, monkeypatch, make, pattern, norm):
        monkeypatch.setitem(peers.PEERS, "it", peer(make))
        [row] = times.measure_all(setting((1, 2, 4), 1, 2, 64, pattern=pattern, norm=norm), [], ["it"], 1)
        assert (row.absent, row.right, row.ours) == (None, True, False)
        assert max(row.errors.values()) < 1e-5

    @pytest.mark.parametrize("name", ["SDPA, dense mask", "SDPA flash, by scale"])
    @pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
    def test_those_in_pytorch_are_right(self, untimed, name, pattern):
        pytest.importorskip("torch")
        [row] = times.measure_all(setting((1, 2, 4), 1, 2, 64, pattern=pattern, norm=True), [], [name], 1)
        assert (row.absent, row.right) == (None, True)
        assert max(row.errors.values()) < 1e-5

    def test_all_that_cannot_run_here_are_a_line_with_the_reason(self, untimed, monkeypatch):
        def broken(setting):
            raise RuntimeError("no kernel image is available\nand a page of details")

        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.setitem(peers.PEERS, "broken", peer(broken))
        rows = list(times.measure_all(setting(), ["nonsense", "xla"], list(peers.PEERS), 1))
        assert len(rows) == 2 + len(peers.PEERS)
        lines = table.render(setting(), rows, RATES).splitlines()
        assert "FlexAttention: absent, needs a GPU." in lines
        assert "splash attention: absent, needs a TPU." in lines
        assert "SDPA, dense mask: absent, torch is not installed." in lines
        assert "broken: absent, RuntimeError: no kernel image is available." in lines
        assert any(line.startswith("nonsense: absent, ") for line in lines)

    def test_packed_segments_are_absent_where_scales_see_each_other(self):
        with pytest.raises(ValueError, match="packed segments cannot see each other"):
            peers.cudnn_packed(setting(pattern="block_causal"))

    def test_a_reference_whose_logits_would_not_fit_is_absent(self, untimed, monkeypatch):
        monkeypatch.setattr(times, "DENSE_LIMIT", 4 * 2 * 3 * 25 - 1)
        [row] = times.measure_all(setting(), ["reference"], [], 1)
        assert row.absent.startswith("its dense logits would take")


class TestTable:
    def rows(self):
        seconds = {"forward": times.Time(2e-3, 1e-3, 3e-3), "backward": times.Time(4e-3, 4e-3, 4e-3)}
        seconds |= {"both": times.Time(5e-3, 5e-3, 5e-3)}
        errors = {"output": 1e-3, "gradients": 2e-3}
        ours = times.Row("ours", True, None, errors, True, seconds, 3 * 2**20, default=True)
        theirs = {name: times.Time(3 * time.median, time.low, time.high) for name, time in ours.times.items()}
        return [times.Row("theirs", False, None, errors, True, theirs), ours, times.Row("gone", False, "is away")]

    def test_its_cells_follow_from_times_and_rates(self):
        chosen = setting((1, 10), 10, 10, 50)  # 20 kFLOP a pair
        name, *cells = table.render(chosen, self.rows(), RATES, markdown=True).splitlines()[6].strip("| ").split(" | ")
        flops = 4 * 10 * 10 * 50 * 10001
        assert name == "ours *"
        assert cells[:2] == ["1.0e-03", "2.0e-03"]
        assert cells[2:6] == ["2 ± 1", "1.00", f"{flops / 1e10 / 2e-3:.0%}", f"{flops / 2e-3 / 1e12:.3g}"]
        assert cells[6:8] == ["4 ± 0", "1.00"]
        assert cells[-3:] == ["5 ± 0", "1.00", "3"]

    def test_it_is_aligned_ranked_and_the_same_in_markdown(self):
        chosen = setting()
        title, _, *drawn, absent = table.render(chosen, self.rows(), RATES).splitlines()
        assert title.startswith("N=5 B=2 H=3 D=8 float32 block_diagonal, without QK-norm, sides 1,2")
        assert absent == "gone: absent, is away."
        assert len({len(line) for line in drawn}) == 1
        assert [line.split()[0] for line in drawn[1:]] == ["ours", "theirs"]
        assert "3.00" in drawn[2]
        markdown = table.render(chosen, self.rows(), RATES, markdown=True).splitlines()
        shown = [line.strip("|").split("|") for line in markdown if line.startswith("| ")]
        assert ["".join(" ".join(cells).split()) for cells in shown] == ["".join(line.split()) for line in drawn]

    def test_the_ratio_to_nothing_right_is_not_a_number(self):
        assert math.isnan(table.ours_at_best([row for row in self.rows() if not row.ours], "both"))
