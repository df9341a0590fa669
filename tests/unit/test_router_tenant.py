"""Tenants are named by a trusted header or not at all, over HTTP and gRPC alike."""

from __future__ import annotations

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.router.tenant import TenantHeader
from support.router_stack import assert_error, running_stack


def test_only_the_configured_header_counts() -> None:
    headers = {"x-tenant": "acme", "x-other": "evil"}
    assert TenantHeader("x-tenant").read(headers.get) == "acme"
    assert TenantHeader().read(headers.get) == ""
    assert TenantHeader("x-absent").read(headers.get) == ""


@pytest.mark.parametrize("name", ["a" * 129, "naïve", "a\nb"])
def test_a_name_is_short_and_plain(name: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        TenantHeader("x-tenant").read({"x-tenant": name}.get)
    assert raised.value.field == "x-tenant"


async def test_the_tenant_reaches_both_workers() -> None:
    async with running_stack(tenant_header="X-Tenant") as stack:
        body = {"prompt": list(range(100)), "max_tokens": 1}
        response = await stack.client.post("/v1/completions", json=body, headers={"x-tenant": "acme"})
        assert response.status == 200
        assert stack.decode.calls[0].context.tenant == stack.prefill.calls[0].context.tenant == "acme"
        refused = await stack.client.post("/v1/completions", json=body, headers={"x-tenant": "a" * 200})
        await assert_error(refused, 400, "invalid_argument", "x-tenant")
