"""GRU and LSTM over shards against torch's own layers over the whole sequence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from models.mixers.gru import GRU
from models.mixers.lstm import LSTM
from models.relay import cut, relay
from tests.distributed import run_distributed
from tests.models.scan.cases import make_reset
from tests.trainer.runs import of_kind, run
from trainer.events import Stepped
from trainer.parallel.relay import PIECE_TOKENS, RelayExchange
from trainer.parallel.sequence_group import RelayMeter, SequenceGroup
from trainer.parallel.sharded import ShardedOps
from trainer.parallel.topology import Topology

pytestmark = pytest.mark.slow

BATCH, WIDTH, HIDDEN = 2, 5, 6
LAYERS = {"gru": GRU, "lstm": LSTM}
FORGET = {"gru": slice(HIDDEN, 2 * HIDDEN), "lstm": slice(HIDDEN, 2 * HIDDEN)}


def _layer(name: str, memory: float, dtype: torch.dtype = torch.float64) -> GRU | LSTM:
    """A layer with large weights, as training makes them, whose channels remember that long."""
    torch.manual_seed(4)
    layer = LAYERS[name](WIDTH, HIDDEN).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
        layer.get_parameter("bias_ih_l0")[FORGET[name]] = torch.tensor(memory - 1).log()
    return layer


def _leaves(layer: GRU | LSTM, tokens: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    dtype, states = layer.weights()[0].dtype, 1 if isinstance(layer, GRU) else 2
    u = torch.randn(BATCH, tokens, WIDTH, dtype=dtype, requires_grad=True)
    carry = [torch.randn(BATCH, HIDDEN, dtype=dtype) * 0.5 for _ in range(states)]
    return u, tuple(each.requires_grad_() for each in carry)


def _torchs_own(layer: GRU | LSTM, u: Tensor, carry: tuple[Tensor, ...]) -> tuple:
    """nn.GRU or nn.LSTM with the layer's state dict, over the whole sequence in one call."""
    kind = nn.GRU if isinstance(layer, GRU) else nn.LSTM
    own = kind(WIDTH, HIDDEN, batch_first=True).to(u.dtype)
    own.load_state_dict(layer.state_dict())
    hidden = [each.unsqueeze(0) for each in carry]
    y, last = own(u, hidden[0] if len(hidden) == 1 else tuple(hidden))
    last = (last,) if isinstance(last, Tensor) else last
    return y, [each[0] for each in last], list(own.parameters())


@contextmanager
def _group() -> Iterator[SequenceGroup]:
    """All ranks. Its threads would stay in processes that serve other tests too."""
    topology = Topology(sp_size=torch.distributed.get_world_size())
    yield topology.sequence
    topology.destroy()


def _compare(group: SequenceGroup, name: str, shard: int, memory: float, where: str) -> RelayMeter:
    """On every rank: outputs, states and every gradient of the shards equal those of the whole."""
    layer, tokens = _layer(name, memory), shard * group.size
    u, carry = _leaves(layer, tokens)
    mine = slice(group.rank * shard, (group.rank + 1) * shard)
    if where == "shard edges":
        reset = torch.zeros(BATCH, tokens, dtype=torch.uint8)
        reset[0, ::shard], reset[1, shard - 1 :: shard] = 1, 1
    else:
        reset = make_reset(BATCH, tokens, where)
    if reset is None:
        y, last, weights = _torchs_own(layer, u, carry)
    else:
        (y, last), weights = relay(layer, u, carry, reset), layer.weights()
    cot_y, cots = torch.randn_like(y), [torch.randn_like(each) for each in last]
    want = torch.autograd.grad([y, *last], [u, *carry, *weights], [cot_y, *cots])
    exchange = RelayExchange(group)
    local = u.detach()[:, mine].clone().requires_grad_()
    local_reset = None if reset is None else reset[:, mine]
    group.meter.take()
    got_y, got_last = exchange.relay(layer, local, carry, local_reset)
    rounds, sent = group.relays.rounds, group.meter.take()[1]
    numbers = len(carry) * BATCH * HIDDEN + 2  # and two figures, README.md beside relay.py has it
    assert sent == rounds * numbers * u.element_size()
    got = torch.autograd.grad(
        [got_y, *got_last], [local, *carry, *layer.weights()], [cot_y[:, mine], *cots]
    )
    torch.testing.assert_close(got_y, y[:, mine], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(got[0], want[0][:, mine], rtol=1e-10, atol=1e-11)
    count = 1 + len(carry)
    for actual, expected in zip(
        (*got_last, *got[1:count]), (*last, *want[1:count]), strict=True
    ):  # the same on every rank
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    for actual, expected in zip(got[count:], want[count:], strict=True):
        total = actual.clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)
    return group.relays.take()


def _check_all(name: str) -> int:
    shards, checked = (1, 7, 2 * PIECE_TOKENS + 9), 0
    with _group() as group:
        for shard in shards:
            for where in ("none", "start", "edges", "shard edges", "random"):
                _compare(group, name, shard, memory=12.0, where=where)
                checked += 1
    return checked


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_relay_over_ranks_equals_the_whole(name, ranks):
    """Memories of some 12 tokens; pieces shorter and longer than a shard; resets anywhere."""
    assert run_distributed(_check_all, ranks, name) == [15] * ranks


def _remember(name: str) -> RelayMeter:
    with _group() as group:
        return _compare(group, name, 80, 1e5, "none")


@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_that_does_not_forget_takes_the_plain_relay(name):
    """Memories far longer than a shard: as many rounds as ranks, and as exact."""
    meters = run_distributed(_remember, 3, name)
    assert [meter.rounds for meter in meters] == [3, 3, 3]
    assert meters[0].rerun_tokens == meters[1].rerun_tokens == 4 * 80  # two more, both ways


def _fall_together(name: str, tolerance: float) -> tuple[bool, RelayMeter]:
    """In fp32: whether it is equal to the bit to the plain relay with the same pieces."""
    with _group() as group:
        return _fall_together_in(group, name, tolerance)


def _fall_together_in(group: SequenceGroup, name: str, tolerance: float) -> tuple[bool, RelayMeter]:
    shard = 16 * PIECE_TOKENS
    layer = _layer(name, 60.0, torch.float32)
    u, carry = _leaves(layer, shard * 2)
    plain, state = [], carry
    with torch.no_grad():
        for piece in cut(None, shard * 2, PIECE_TOKENS):
            y, state = layer.run(piece.of(u), state)
            plain.append(y)
        mine = slice(group.rank * shard, (group.rank + 1) * shard)
        ops = ShardedOps(group, tolerance)
        y, last = ops.relay(layer, u[:, mine], carry, None)
    whole = torch.cat(plain, dim=1)[:, mine]
    assert (y - whole).abs().max() <= 2 * tolerance
    equal = torch.equal(y, whole) and all(map(torch.equal, last, state))
    return equal, group.relays.take()


@pytest.mark.parametrize("name", LAYERS)
def test_it_runs_again_only_until_states_fall_together(name):
    """Equal to the bit, and not a whole shard run again; to a tolerance sooner, and it is said."""
    (first, exact), (second, _) = run_distributed(_fall_together, 2, name, 0.0)
    assert first
    assert second
    assert exact.rounds == 2
    assert 0 < exact.rerun_tokens <= 12 * PIECE_TOKENS
    assert exact.residual == 0
    (_, near), _ = run_distributed(_fall_together, 2, name, 1e-3)
    assert near.rerun_tokens < exact.rerun_tokens
    assert 0 < near.residual <= 1e-3


def _grow(hidden_weight: float, shard: int) -> Tensor:
    """The gradient of h0 of a GRU at rest, where it grows by 1/2 + weight/4 at every step back.

    The loss is of the last step of the first rank and the first of the second.
    """
    layer = GRU(1, 1)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.get_parameter("weight_hh_l0")[2] = hidden_weight
    h0 = torch.zeros(1, 1, requires_grad=True)
    with _group() as group:
        y, _ = RelayExchange(group).relay(layer, torch.zeros(1, shard, 1), (h0,), None)
        asked = y[:, -1] if group.rank == 0 else y[:, 0]
        return torch.autograd.grad(asked.sum(), h0)[0]


@pytest.mark.parametrize(
    ("weight", "growth", "shard"), [(10, 3, 16), (2.2, 1.05, 2 * PIECE_TOKENS)]
)
def test_a_small_gradient_that_grows_on_its_way_is_not_dropped(weight, growth, shard):
    """It arrives as a rounding of what the shard's own has grown to, and will grow alike."""
    for got in run_distributed(_grow, 2, float(weight), shard):
        want = float(growth) ** shard + float(growth) ** (shard + 1)
        assert float(got) == pytest.approx(want, rel=1e-4)


def _ask_at_the_end(name: str) -> int:
    """Tokens run again where the last rank alone has a loss; gradients are as of the whole."""
    shard = 16 * PIECE_TOKENS
    layer = _layer(name, 12.0, torch.float32)
    with _group() as group:
        u, carry = _leaves(layer, shard * group.size)
        mine = slice(group.rank * shard, (group.rank + 1) * shard)
        whole, _ = relay(layer, u, carry, None)
        want = torch.autograd.grad(whole[:, -4:].square().sum(), u)[0][:, mine]
        exchange, local = RelayExchange(group), u.detach()[:, mine].clone().requires_grad_()
        y, _ = exchange.relay(layer, local, carry, None)
        group.relays.take()
        asked = y[:, -4:].square().sum() * (group.rank == group.size - 1)
        got = torch.autograd.grad(asked, local)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        return group.relays.take().rerun_tokens


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_that_fades_is_not_carried_for_ever(name):
    for tokens in run_distributed(_ask_at_the_end, 3, name):
        assert tokens < 8 * PIECE_TOKENS


def _believe(name: str) -> RelayMeter:
    """With a tolerance so large that no guess is wrong."""
    with _group() as group:
        layer = _layer(name, 12.0)
        u, carry = _leaves(layer, 40)
        mine = slice(group.rank * 20, (group.rank + 1) * 20)
        RelayExchange(group, 10.0).relay(layer, u[:, mine], carry, None)
        return group.relays.take()


def test_what_passes_for_the_same_is_told():
    for meter in run_distributed(_believe, 2, "gru"):
        assert (meter.rounds, meter.rerun_tokens) == (1, 0)
        assert 0.01 < meter.residual < 10


@pytest.mark.parametrize("name", LAYERS)
def test_states_stay_in_fp32_where_inputs_are_bf16(name):
    """Memories of 400 tokens: rounded to bf16 at every step, a state would be lost."""
    layer = _layer(name, 400.0, torch.float32)
    u, carry = _leaves(layer, 1200)
    exact = relay(layer, u.bfloat16().float(), carry, None)
    y, last = relay(layer, u.bfloat16(), carry, None)
    assert y.dtype == torch.bfloat16
    for got, want in zip(last, exact[1], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_run_relays_to_the_tolerance_that_it_is_given(config_file):
    """States that are that near pass for the same, which the metrics tell."""
    found = []
    for tolerance in (0.0, 0.9):
        options = ["model.mixer=gru", "parallel.sp=2", f"parallel.relay_tolerance={tolerance}"]
        options += ["train.steps=1", "evaluate.sequences=0", f"run.dir={config_file}-{tolerance}"]
        (step,) = of_kind(run(config_file, 2, *options), Stepped)
        found.append(step.metrics["relay_residual"])
    assert found[0] <= 2**-23
    assert found[1] > 1e-3


def _planted(name: str) -> None:
    """A relay that believes its guesses."""
    group = Topology(sp_size=2).sequence
    layer = _layer(name, 12.0)
    u, carry = _leaves(layer, 40)
    mine = slice(group.rank * 20, (group.rank + 1) * 20)
    RelayExchange.settle = lambda self, mine, fixed, first: _once(self, mine, fixed, first)
    y, _ = RelayExchange(group).relay(layer, u[:, mine], carry, None)
    wrong = (y - relay(layer, u, carry, None)[0][:, mine]).abs().max()
    assert (wrong > 1e-3) == (group.rank > 0)


def _once(exchange: RelayExchange, mine, fixed: Tensor, first: int) -> list[Tensor]:
    mine.run(fixed if exchange.group.rank == first else torch.zeros_like(fixed))
    return [mine.given()] * exchange.group.size


@pytest.mark.parametrize("name", LAYERS)
def test_a_guess_that_is_believed_would_be_seen(name):
    run_distributed(_planted, 2, name, fresh=True)


@pytest.mark.parametrize("name", LAYERS)
def test_one_device_too_calls_its_kernel_for_so_many_steps_at_most(name, monkeypatch):
    """cuDNN fails at longer calls; in parts it is the same."""
    layer = _layer(name, 12.0)
    u, carry = _leaves(layer, 40)
    whole, last = relay(layer, u, carry, None)
    monkeypatch.setattr("models.relay.MOST_STEPS", 7)
    lengths: list[int] = []
    monkeypatch.setattr(
        layer, "run", lambda u, s: (lengths.append(u.shape[1]), type(layer).run(layer, u, s))[1]
    )
    parts, last_of_parts = relay(layer, u, carry, None)
    assert max(lengths) == 7
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(last_of_parts, last, rtol=1e-10, atol=1e-11)


def test_pieces_begin_at_resets_and_at_the_same_places():
    reset = torch.zeros(2, 600, dtype=torch.bool)
    reset[0, [0, 300]], reset[1, 299] = True, True
    pieces = cut(reset, 600, 256)
    assert [(p.begin, p.end) for p in pieces] == [
        (0, 256),
        (256, 299),
        (299, 300),
        (300, 512),
        (512, 600),
    ]
    state = (torch.ones(2, 3),)
    assert [p.clear(state)[0][:, 0].tolist() for p in pieces[:4]] == [
        [0, 1],
        [1, 1],
        [1, 0],
        [0, 1],
    ]
