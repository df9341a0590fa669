"""What can be said of the Dockerfiles without an engine that builds them."""

from __future__ import annotations

import re

import pytest

from support.helm_chart import CHART, ROOT, service_containers, template

ROLES = ("router", "prefill", "decode")


def instructions(role: str) -> list[tuple[str, str]]:
    """(NAME, rest) of every instruction, with continued lines joined."""
    text = (ROOT / "services" / role / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


@pytest.mark.parametrize("role", ROLES)
def test_it_builds_in_one_stage_and_runs_in_another_without_root(role: str) -> None:
    steps = instructions(role)
    stages = [rest for name, rest in steps if name == "FROM"]
    assert [" AS build" in stage for stage in stages] == [True, False]
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    installs = [rest for name, rest in steps if name == "RUN" and f"'.[{role}]'" in rest]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    last = [rest for name, rest in steps if name == "COPY"][-1]
    assert last.startswith("--from=build ")


@pytest.mark.parametrize("role", ROLES)
def test_its_user_may_write_its_home_without_a_volume(role: str) -> None:
    """A directory that WORKDIR makes belongs to root."""
    names = [name for name, _ in instructions(role)]
    steps = dict(instructions(role))
    owner, _, group = steps["USER"].partition(":")
    home = re.search(r"HOME=(\S+)", steps["ENV"])
    assert home is not None
    assert home[1] == steps["WORKDIR"]
    made = ("RUN", f"install --directory --owner {owner} --group {group} {home[1]}")
    assert instructions(role).index(made) < names.index("USER")


@pytest.mark.parametrize("role", ROLES)
def test_what_it_copies_is_there_and_in_the_context(role: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [rest.split() for name, rest in instructions(role) if name == "COPY" and not rest.startswith("--from")]
    sources = {source for copy in copies for source in copy[:-1]}
    assert sources == allowed
    for source in sources:
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("role", ROLES)
def test_the_chart_runs_what_the_image_holds(role: str) -> None:
    """Same program, same user, and the ports that the image names."""
    steps = dict(instructions(role))
    container = next(c for c in service_containers(template()) if c["name"] == role)
    assert steps["ENTRYPOINT"] == '["hma-serve"]'
    assert steps["CMD"] == f'["{role}"]'
    assert container["command"] == ["hma-serve", role]
    assert sorted(map(int, steps["EXPOSE"].split())) == sorted(p["containerPort"] for p in container["ports"])
    assert f"runAsUser: {steps['USER'].partition(':')[0]}" in (CHART / "values.yaml").read_text()
