"""The page pool: nothing is lost, nothing is owned twice, and what fits is known before it is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hma_serve.core.errors import Internal
from hma_serve.decode.pages import KvGeometry, Need, PagePool, Reservation

FORMATS = ("f32", "bf16", "tt_bfp8_b")
GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=32)


def make_pool(tokens: int = 2000, dtype: torch.dtype = torch.bfloat16) -> PagePool:
    return PagePool(GEOMETRY, packed_formats=FORMATS, plain_dtype=dtype, capacity_tokens=tokens)


def need(packed: int, total: int, k_format: str = "tt_bfp8_b", v_format: str = "tt_bfp8_b") -> Need:
    return Need.of(packed_tokens=packed, total_tokens=total, k_format=k_format, v_format=v_format)


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserve and free, in any mixture of formats."""

    @initialize(dtype=st.sampled_from([torch.bfloat16, torch.float32]))
    def start(self, dtype: torch.dtype) -> None:
        self.pool = make_pool(dtype=dtype)
        self.held: list[Reservation] = []
        self.empty = self.pool.used_tokens

    @rule(
        groups=st.integers(0, 40),
        plain=st.integers(1, 600),
        k_format=st.sampled_from(FORMATS),
        v_format=st.sampled_from(FORMATS),
    )
    def reserve(self, groups: int, plain: int, k_format: str, v_format: str) -> None:
        wanted = need(groups * 32, groups * 32 + plain, k_format, v_format)
        if self.pool.can_reserve(wanted):
            reservation = self.pool.reserve(wanted)
            assert len(reservation.packed_k) == len(reservation.packed_v) == groups
            assert len(reservation.plain_k) == len(reservation.plain_v) == -(-plain // 32)
            self.held.append(reservation)
        else:
            with pytest.raises(Internal):
                self.pool.reserve(wanted)
            assert self.held or not self.pool.fits_when_empty(wanted)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity()
        assert 0 <= self.pool.used_tokens <= self.pool.capacity_tokens
        if not self.held:
            assert self.pool.used_tokens == self.empty == 0


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
    pool = make_pool()
    held = [pool.reserve(need(64, 130, k, v)) for k in FORMATS for v in FORMATS]
    for number, reservation in enumerate(held):
        wanted = reservation.need
        for layer in range(GEOMETRY.layers):
            pool.packed(wanted.k_format, layer)[reservation.packed_k] = 4 * number
            pool.packed(wanted.v_format, layer)[reservation.packed_v] = 4 * number + 1
            pool.plain(layer)[reservation.plain_k] = 4 * number + 2
            pool.plain(layer)[reservation.plain_v] = 4 * number + 3
    for number, reservation in enumerate(held):
        wanted = reservation.need
        for layer in range(GEOMETRY.layers):
            assert (pool.packed(wanted.k_format, layer)[reservation.packed_k] == 4 * number).all()
            assert (pool.packed(wanted.v_format, layer)[reservation.packed_v] == 4 * number + 1).all()
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


def test_freeing_twice_is_refused() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(32, 40))
    pool.free(reservation)
    with pytest.raises(Internal):
        pool.free(reservation)


def test_integrity_notices_a_lost_page() -> None:
    pool = make_pool()
    pool.reserve(need(32, 40))
    pages = pool._formats["bf16"]
    next(iter(pages.free.values())).pop()
    with pytest.raises(Internal, match="bf16"):
        pool.check_integrity()


def test_integrity_notices_a_page_with_two_owners() -> None:
    pool = make_pool()
    reservation = pool.reserve(need(32, 40))
    pages = pool._formats["bf16"]
    next(iter(pages.free.values())).append(int(reservation.plain_k[0]))
    with pytest.raises(Internal, match="bf16"):
        pool.check_integrity()


@given(st.integers(0, 200), st.integers(1, 3000))
def test_a_need_covers_every_token(groups: int, plain: int) -> None:
    wanted = need(groups * 32, groups * 32 + plain)
    assert wanted.packed_groups == groups
    assert (wanted.plain_groups - 1) * 32 < plain <= wanted.plain_groups * 32
