"""Who gets a page: token, cookie, host names, headers, over a real socket."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from cluster.contracts.errors import UserError
from cluster.pages.access import Access, names_of
from cluster.pages.app import new_app, page
from cluster.pages.server import PageServer

TOKEN = "the-token-of-this-test"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: str


@dataclass
class Site:
    server: PageServer

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, body)

    def cookie(self) -> str:
        return f"accord-{self.server.port}={TOKEN}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    app = new_app()

    @app.get("/")
    def first() -> object:
        return page("error.html.j2", title="<script>", text="a\u202eb")

    @app.get("/broken")
    def broken() -> object:
        raise RuntimeError("the secret detail")

    @app.get("/health")
    def health() -> object:
        return {"ok": True}

    access = Access(token=TOKEN, open_paths=frozenset({"/health"}))
    server = PageServer(app, access, "127.0.0.1", 0)
    yield Site(server)
    server.stop()


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=", {}),
        ("/?token=wrong", {}),
        ("/?token=%ff%c3", {}),
        ("/", {"Authorization": "Bearer wrong"}),
        ("/", {"Authorization": f"Basic {TOKEN}"}),
        ("/", {"Cookie": f"accord-1={TOKEN}"}),  # of another port of this host
        ("/", {"Cookie": "accord-=;;=\x01"}),
        ("/static/pages.js", {}),
        ("/no-such-page", {}),
    ],
)
def test_nothing_is_shown_without_the_token(site: Site, path: str, headers: dict[str, str]) -> None:
    answer = site.get(path, **headers)
    assert answer.status == 401
    assert "Open the address that was printed" in answer.body


def test_the_token_becomes_a_cookie_and_leaves_the_address(site: Site) -> None:
    answer = site.get(f"/x%20y?step=3&token={TOKEN}&find=a%26b")
    assert answer.status == 303
    assert answer.headers["location"] == "/x%20y?step=3&find=a%26b"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(site.cookie())
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert site.get("/", Cookie=site.cookie()).status == 200


def test_the_exchange_leads_to_no_other_host(site: Site) -> None:
    answer = site.get(f"//evil.example/x?token={TOKEN}")
    assert answer.headers["location"] == "/evil.example/x"


def test_a_script_may_send_the_token_in_a_header(site: Site) -> None:
    assert site.get("/", Authorization=f"Bearer {TOKEN}").status == 200


def test_another_host_name_is_refused_also_with_the_token(site: Site) -> None:
    answer = site.get("/", Host="evil.example", Cookie=site.cookie())
    assert answer.status == 400
    for name in ("localhost", "127.0.0.1", "[::1]"):
        host = f"{name}:{site.server.port}"
        assert site.get("/", Host=host, Cookie=site.cookie()).status == 200, name


def test_every_answer_says_what_a_browser_may_do(site: Site) -> None:
    for answer in (
        site.get("/"),
        site.get("/", Cookie=site.cookie()),
        site.get("/no-such-page", Cookie=site.cookie()),
        site.get("/", Host="evil.example"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers


def test_text_is_escaped_and_what_is_invisible_shown(site: Site) -> None:
    body = site.get("/", Cookie=site.cookie()).body
    assert "<script>" not in body.replace('<script src="/static/pages.js" defer></script>', "")
    assert "&lt;script&gt;" in body
    assert "a⟨U+202E⟩b" in body


def test_errors_are_pages_and_tell_no_detail(site: Site) -> None:
    missing = site.get("/no-such-page", Cookie=site.cookie())
    assert (missing.status, "There is no such page" in missing.body) == (404, True)
    broken = site.get("/broken", Cookie=site.cookie())
    assert broken.status == 500
    assert "RuntimeError" in broken.body
    assert "the secret detail" not in broken.body
    assert site.get("/", "POST", Cookie=site.cookie()).status == 405


def test_an_open_path_needs_no_token(site: Site) -> None:
    assert site.get("/health").status == 200


def test_static_files_stay_in_their_folder(site: Site) -> None:
    assert site.get("/static/page.css", Cookie=site.cookie()).status == 200
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"):
        assert site.get(path, Cookie=site.cookie()).status == 404, path


def test_a_frame_is_allowed_by_name_only() -> None:
    server = PageServer(new_app(), Access(framed_by=("http://127.0.0.1:8265",)), "127.0.0.1", 0)
    answer = Site(server).get("/")
    server.stop()
    policy = answer.headers["content-security-policy"]
    assert "frame-ancestors http://127.0.0.1:8265" in policy
    assert "x-frame-options" not in answer.headers


def test_a_server_ends_and_frees_its_port() -> None:
    before = threading.active_count()
    server = PageServer(new_app(), Access(), "127.0.0.1", 0)
    with pytest.raises(UserError, match="cannot listen") as problem:
        PageServer(new_app(), Access(), "127.0.0.1", server.port)
    assert str(server.port) in str(problem.value)
    server.stop()
    assert threading.active_count() == before
    PageServer(new_app(), Access(), "127.0.0.1", server.port).stop()


def test_tokens_are_new_each_time_and_not_shown_in_logs() -> None:
    first, second = Access(), Access()
    assert first.token != second.token
    assert len(first.token) >= 32
    assert first.token not in repr(first)


def test_a_server_for_the_network_answers_to_its_own_names() -> None:
    assert "localhost" in names_of("127.0.0.1")
    assert "192.0.2.7" in names_of("192.0.2.7")
    assert "0.0.0.0" not in names_of("0.0.0.0")
