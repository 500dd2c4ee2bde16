"""A few of what `benchmarks/serve_attack.py` sends by the thousand: no 5xx, nobody let in, nobody rung."""

from __future__ import annotations

from collections import Counter

import httpx
import pytest
import requests
import schemathesis
from attacks import KINDS, WAYS, Canary, probes, ring, uploads
from fakeserve import running
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as how
from starlette.testclient import TestClient

from lanting.serve.app import build_app
from lanting.serve.errors import BusyError
from lanting.serve.house import open_house
from lanting.serve.settings import Settings

WANTED = ("method", "url", "params", "headers", "cookies", "json", "data", "files")


@pytest.fixture(scope="module")
def fetching(tmp_path_factory):
    """A server that fetches addresses, and has the studio's door shut."""
    with running(tmp_path_factory.mktemp("attack"), urls=True) as one:
        yield one


def test_uploads_of_every_kind_are_answered_in_words(fetching):
    seen, sent = Counter(), set()
    with httpx.Client(base_url=fetching.url, timeout=30) as client:
        for upload in uploads(2 * len(KINDS)):
            answer = upload.send(client)
            seen[answer.status_code] += 1
            sent.add((upload.path, upload.form))
            assert answer.status_code < 500, (upload.kind, upload.path, answer.text)
            if answer.status_code >= 400:
                assert answer.json() and "Traceback" not in answer.text
    assert len(sent) >= len({way[:2] for way in WAYS}) - 1 and seen[400] > 5


def test_strangers_are_refused_and_nothing_inside_is_rung(fetching):
    canary, tried = Canary(), Counter()
    for probe in probes(canary.port):
        if probe.path.startswith(("/en", "/logout", "/studio")):
            continue  # of the studio, which has tests of its own
        status, body = ring(fetching.port, probe)
        assert status in probe.refused and b"root:" not in body, (probe, status, body[:200])
        tried[probe.what] += 1
    assert canary.rung == 0 and min(tried.values()) > 30 and len(tried) == 4


# ---------------------------------------------------------------- by the server's own description
def test_what_openapi_allows_and_forbids(tmp_path):
    """On an application that checks everything and then has no room, so that nothing waits for a worker."""
    house = open_house(Settings(tmp_path))

    async def full(*_: object) -> None:
        raise BusyError("the queue is full: {count} jobs wait; try again in a moment", count=0)

    house.desk._accept = full  # type: ignore[method-assign,assignment]
    client = TestClient(build_app(house), base_url="http://localhost", raise_server_exceptions=False)
    table, asked = client.get("/openapi.json").json(), 0
    for found in schemathesis.openapi.from_dict(table).get_all_operations():

        @how(max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
        @given(case=found.ok().as_strategy())
        def check(case):
            told = case.as_transport_kwargs(base_url="http://localhost")
            made = requests.Request(**{name: told[name] for name in WANTED if name in told}).prepare()
            answer = client.request(made.method, made.url, content=made.body or b"", headers=dict(made.headers))
            assert answer.status_code < 500 or case.path == "/readyz", (case.method, case.path, answer.text)

        check()
        asked += 1
    assert asked > 40
