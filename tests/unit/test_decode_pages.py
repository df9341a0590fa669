"""The page pool: nothing is lost, nothing is owned twice, and what fits is known before it is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hma_serve.core.errors import Internal
from hma_serve.decode.page_order import PageOrder, Role, page_order
from hma_serve.decode.pages import KvGeometry, Need, PagePool, Reservation
from hma_serve.quant import codec, codec_names

FORMATS = ("f32", "bf16", "tt_bfp8_b", "nvfp4", "fp8_e4m3fn.tensor")
GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=32)


def make_pool(tokens: int = 2000, dtype: torch.dtype = torch.bfloat16) -> PagePool:
    return PagePool(GEOMETRY, packed_formats=FORMATS, plain_dtype=dtype, capacity_tokens=tokens)


def need(packed: int, total: int, k_format: str = "tt_bfp8_b", v_format: str = "tt_bfp8_b") -> Need:
    return Need.of(packed_tokens=packed, total_tokens=total, k_format=k_format, v_format=v_format)


def keys(prompt: int, groups: int) -> list[bytes]:
    """Of prompts that are alike in their first three groups, and pairwise in their next three."""
    return [bytes([group, 0 if group < 3 else prompt // 2 if group < 6 else prompt]) for group in range(groups)]


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserve, publish, grow, strip and free, in any mixture of formats, with prefixes in common."""

    @initialize(dtype=st.sampled_from([torch.bfloat16, torch.float32]))
    def start(self, dtype: torch.dtype) -> None:
        self.pool = make_pool(dtype=dtype)
        self.held: list[tuple[Reservation, list[bytes]]] = []

    @rule(
        groups=st.integers(0, 40),
        plain=st.integers(1, 600),
        formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
        prompt=st.integers(0, 7),
        shares=st.booleans(),
    )
    def reserve(self, groups: int, plain: int, formats: tuple[str, str], prompt: int, shares: bool) -> None:
        wanted = need(groups * 32, groups * 32 + plain, *formats)
        # The codecs are part of a key, as they are of a real one.
        names = [key + str(formats).encode() for key in keys(prompt, groups)] if shares else []
        if not self.pool.can_reserve(wanted, names):
            with pytest.raises(Internal):
                self.pool.reserve(wanted, names)
            assert self.held or not self.pool.fits_when_empty(wanted)
            return
        reservation = self.pool.reserve(wanted, names)
        assert len(reservation.packed_k) == len(reservation.packed_v) == groups
        assert len(reservation.plain_k) == len(reservation.plain_v) == -(-plain // 32)
        for key, k_page, v_page in zip(
            names, reservation.packed_k.tolist(), reservation.packed_v.tolist(), strict=False
        ):
            for other, others in self.held:
                if key in others[: len(other.shared)]:
                    place = others.index(key)
                    assert (k_page, v_page) == (int(other.packed_k[place]), int(other.packed_v[place]))
        self.held.append((reservation, names))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        reservation, names = self._drawn(data)
        self.pool.publish(reservation, names)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), groups=st.integers(1, 9))
    def grow(self, data: st.DataObject, groups: int) -> None:
        reservation, _ = self._drawn(data)
        before = len(reservation.plain_k)
        if self.pool.can_grow(groups):
            self.pool.grow(reservation, groups)
            assert len(reservation.plain_k) == len(reservation.plain_v) == before + groups

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def strip(self, data: st.DataObject) -> None:
        self.pool.strip(self._drawn(data)[0])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.free(self.held.pop(place)[0])

    def _drawn(self, data: st.DataObject) -> tuple[Reservation, list[bytes]]:
        return self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity()
        assert 0 <= self.pool.used_tokens <= self.pool.capacity_tokens
        if not self.held:
            assert self.pool.used_tokens == 0
            # Whatever is kept of old prefixes gives way.
            assert self.pool.can_reserve(need(0, 2000))


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase


def test_capacity_is_at_least_what_was_asked_for() -> None:
    pool = make_pool(tokens=1000)
    assert pool.capacity_tokens >= 1000
    assert pool.memory_bytes >= 1000 * 2 * 2 * GEOMETRY.layers * GEOMETRY.kv_heads * GEOMETRY.head_dim
    reservation = pool.reserve(need(0, pool.capacity_tokens))
    assert pool.used_tokens == pool.capacity_tokens
    assert not pool.can_reserve(need(0, 1))
    pool.free(reservation)


@pytest.mark.parametrize("k_format", FORMATS)
@pytest.mark.parametrize("v_format", FORMATS)
@pytest.mark.parametrize("packed", [0, 32, 512, 992])
def test_a_request_as_long_as_the_capacity_asked_for_fits(k_format: str, v_format: str, packed: int) -> None:
    assert make_pool(tokens=1000, dtype=torch.float32).fits_when_empty(need(packed, 1000, k_format, v_format))


def test_packed_tokens_take_the_room_of_their_codec() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(640, 641))
    assert pool.used_tokens == -(-640 * 17 // 32) + 32
    pool.free(reservation)


def test_pages_of_different_requests_do_not_share_a_byte() -> None:
    pool = make_pool(tokens=6000)
    held = [pool.reserve(need(64, 130, k, v)) for k, v in zip(FORMATS, FORMATS[1:] + FORMATS[:1], strict=True)]
    for number, reservation in enumerate(held):
        wanted = reservation.need
        for layer in range(GEOMETRY.layers):
            pool.packed(wanted.k_format, Role.K, layer)[reservation.packed_k] = 4 * number
            pool.packed(wanted.v_format, Role.V, layer)[reservation.packed_v] = 4 * number + 1
            pool.plain(layer)[reservation.plain_k] = 4 * number + 2
            pool.plain(layer)[reservation.plain_v] = 4 * number + 3
    for number, reservation in enumerate(held):
        wanted = reservation.need
        for layer in range(GEOMETRY.layers):
            assert (pool.packed(wanted.k_format, Role.K, layer)[reservation.packed_k] == 4 * number).all()
            assert (pool.packed(wanted.v_format, Role.V, layer)[reservation.packed_v] == 4 * number + 1).all()
            assert (pool.plain(layer)[reservation.plain_k] == 4 * number + 2).all()
            assert (pool.plain(layer)[reservation.plain_v] == 4 * number + 3).all()


def test_clearing_touches_the_named_pages_only() -> None:
    pool = make_pool()
    first, second = pool.reserve(need(0, 64)), pool.reserve(need(0, 64))
    for layer in range(GEOMETRY.layers):
        pool.plain(layer)[:] = 7
    pool.clear(torch.cat([first.plain_k, first.plain_v]))
    for layer in range(GEOMETRY.layers):
        assert (pool.plain(layer)[first.plain_k] == 0).all()
        assert (pool.plain(layer)[second.plain_k] == 7).all()


def test_a_published_prefix_is_shared_and_stays_until_room_is_needed() -> None:
    pool = make_pool()
    names = keys(0, 20)
    first = pool.reserve(need(640, 650), names)
    assert pool.reserve(need(320, 330), names[:10]).present_groups == 0, "nothing is shared before it is complete"
    pool.publish(first, names)
    second = pool.reserve(need(320, 330), names[:10])
    assert second.present_groups == 10
    assert torch.equal(second.packed_k, first.packed_k[:10])
    pool.free(first)
    pool.free(second)
    again = pool.reserve(need(640, 650), names)
    assert again.present_groups == 20
    pool.free(again)
    # A prefix is given up from its end.
    while len(pool._prefixes.longest(names)) > 15:
        assert pool._prefixes.evict()
    assert pool.reserve(need(640, 650), names).present_groups == 15
    pool.check_integrity()


def test_integrity_notices_a_wrong_count_of_holders() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(64, 70), keys(0, 2))
    pool.publish(reservation, keys(0, 2))
    reservation.shared[1].holders += 1
    with pytest.raises(Internal, match="counted wrong"):
        pool.check_integrity()


def test_freeing_twice_is_refused() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(32, 40))
    pool.free(reservation)
    with pytest.raises(Internal):
        pool.free(reservation)


def test_integrity_notices_a_lost_page() -> None:
    pool = make_pool()
    pool.reserve(need(32, 40))
    size = pool._slabs._sizes[pool._plain_kind]
    next(iter(size.free.values())).pop()
    with pytest.raises(Internal, match="lost or owned twice"):
        pool.check_integrity()


def test_integrity_notices_a_page_with_two_owners() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(32, 40))
    size = pool._slabs._sizes[pool._plain_kind]
    next(iter(size.free.values())).append(int(reservation.plain_k[0]))
    with pytest.raises(Internal, match="lost or owned twice"):
        pool.check_integrity()


class Reversed(PageOrder):
    """An order that is not the wire's: bytes backwards, behind padding."""

    def __init__(self, unit: int) -> None:
        self._unit = unit

    @property
    def page_bytes(self) -> int:
        return self._unit + 7

    def arrange(self, wire: torch.Tensor, /) -> torch.Tensor:
        return torch.nn.functional.pad(wire.flip(-1), (7, 0))

    def restore(self, pages: torch.Tensor, /) -> torch.Tensor:
        return pages[..., 7:].flip(-1)


def test_pages_lie_in_the_order_that_the_pool_was_given() -> None:
    def orders(page_format: str, role: Role, head_dim: int) -> PageOrder:
        wire = page_order(page_format, role, head_dim)
        return Reversed(wire.page_bytes) if role is Role.V else wire

    pool = PagePool(GEOMETRY, packed_formats=["mxfp4"], plain_dtype=torch.bfloat16, capacity_tokens=2000, orders=orders)
    reservation = pool.reserve(need(96, 100, "mxfp4", "mxfp4"))
    units = torch.randint(0, 256, (2, 3, codec("mxfp4").group_bytes(32)), dtype=torch.uint8)
    for role, places in ((Role.K, reservation.packed_k), (Role.V, reservation.packed_v)):
        pool.store("mxfp4", role, 1, places, slice(None), units)
    for role, places in ((Role.K, reservation.packed_k), (Role.V, reservation.packed_v)):
        stored = pool.packed("mxfp4", role, 1)[places]
        assert stored.shape[-1] == pool.order("mxfp4", role).page_bytes
        assert torch.equal(pool.order("mxfp4", role).restore(stored).transpose(0, 1), units)
    assert torch.equal(pool.packed("mxfp4", Role.V, 1)[reservation.packed_v][:, 0, 7:], units[0].flip(-1))


def test_every_codec_costs_no_more_than_its_padding() -> None:
    """A pool of all codecs is as large as one of a single codec, and every page is aligned."""
    few = make_pool(tokens=100_000)
    pool = PagePool(GEOMETRY, packed_formats=codec_names(), plain_dtype=torch.bfloat16, capacity_tokens=100_000)
    assert pool.memory_bytes == few.memory_bytes
    for name in codec_names():
        reservation = pool.reserve(need(3200, 3201, name, name))
        plain = 2 * 32 * 32 * 2
        taken = 100 * 2 * codec(name).group_bytes(32) + plain
        assert pool.used_tokens <= -(-taken * 32 // plain) * 1.02 + 1
        pool.free(reservation)


def test_pages_taken_together_lie_together() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(0, 640))
    assert (pool.plain_numbers(reservation.plain_k).diff() == 1).all()
    pool.plain(1)[reservation.plain_k] = torch.randn(20, 2, 32, 32).bfloat16()
    numbers = pool.plain_numbers(reservation.plain_k)
    run = pool.plain_runs(1)[:, numbers[0] : numbers[-1] + 1]
    assert torch.equal(run.transpose(0, 1), pool.plain(1)[reservation.plain_k])
    assert run[1].is_contiguous()


@given(st.integers(0, 200), st.integers(1, 3000))
def test_a_need_covers_every_token(groups: int, plain: int) -> None:
    wanted = need(groups * 32, groups * 32 + plain)
    assert wanted.packed_groups == groups
    assert (wanted.plain_groups - 1) * 32 < plain <= wanted.plain_groups * 32
