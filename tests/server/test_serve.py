"""The command: who may connect, what it says, what it refuses."""

import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from serve_process import ServeProcess, serving, until
from server_thread import Client

from agnostic_cache import open_storage
from agnostic_cache.errors import ServerStartError, StorageError
from agnostic_cache.server.tls import check_exposed

MIB = 1024 * 1024


class Papers(NamedTuple):
    """Who is who, in files: one CA, its server and its client, and somebody whom another CA knows."""

    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]

    @property
    def serve(self) -> tuple[str, ...]:
        return ("--tls-cert", str(self.server[0]), "--tls-key", str(self.server[1]), "--client-ca", str(self.ca))


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    made = {}
    for name, issuer in {"server": ca, "client": ca, "stranger": other}.items():
        issued = issuer.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        made[name] = folder / f"{name}.pem", folder / f"{name}.key"
    return Papers(folder / "ca.pem", **made)


@pytest.fixture
def encrypted(papers: Papers) -> Iterator[ServeProcess]:
    with serving("--tier", "memory://?max_bytes=64MiB", "--host", "0.0.0.0", *papers.serve) as server:  # noqa: S104 - with TLS
        yield server
        status, logged = server.end()
        assert status == 0
        assert "Traceback" not in logged


class TestWhoMayConnect:
    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
    def test_this_machine_may(self, host: str) -> None:
        check_exposed(host, tls=False, insecure=False)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "no.such.host.invalid"])  # noqa: S104 - refused
    def test_others_may_not(self, host: str) -> None:
        with pytest.raises(ServerStartError):
            check_exposed(host, tls=False, insecure=False)

    def test_others_may_with_certificates_or_where_that_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        check_exposed("0.0.0.0", tls=True, insecure=False)  # noqa: S104 - that is the question
        assert not caplog.records
        check_exposed("0.0.0.0", tls=False, insecure=True)  # noqa: S104 - that is the question
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    def test_a_client_with_a_certificate(self, encrypted: ServeProcess, papers: Papers) -> None:
        cert, key = papers.client
        url = f"lm+tls://localhost:{encrypted.port}?ca={papers.ca}&cert={cert}&key={key}&timeout=20"
        body = os.urandom(9 * MIB)
        with open_storage(url, strict=True) as storage:
            storage.put("a", body)
            found = storage.get("a")
            assert found is not None
            assert bytes(found) == body

    @pytest.mark.parametrize("who", ["nobody", "stranger", "old"])
    def test_a_client_without_a_good_one(self, encrypted: ServeProcess, papers: Papers, who: str) -> None:
        context = ssl.create_default_context(cafile=str(papers.ca))
        if who == "stranger":
            context.load_cert_chain(*papers.stranger)
        if who == "old":
            context.load_cert_chain(*papers.client)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            Client(("127.0.0.1", encrypted.port)) as client,
            pytest.raises(OSError),
            context.wrap_socket(client.socket, server_hostname="localhost") as wrapped,
        ):
            wrapped.sendall(bytes(186))
            if not wrapped.recv(1):
                raise ConnectionResetError

    def test_a_client_that_does_not_encrypt(self, encrypted: ServeProcess) -> None:
        with encrypted.client() as client:
            client.send(bytes(186))
            client.read(1000)  # an alert, at most
            assert client.is_closed()
        with pytest.raises(StorageError):
            open_storage(encrypted.url)

    def test_a_server_whose_certificate_is_another(
        self, encrypted: ServeProcess, papers: Papers, tmp_path: Path
    ) -> None:
        other = tmp_path / "ca.pem"
        trustme.CA().cert_pem.write_to_path(other)
        cert, key = papers.client
        with pytest.raises(StorageError):
            open_storage(f"lm+tls://localhost:{encrypted.port}?ca={other}&cert={cert}&key={key}")
        with pytest.raises(StorageError):
            open_storage(f"lm+tls://localhost:{encrypted.port}?ca=/nowhere")


class TestTheCommand:
    def test_what_it_says_and_how_it_ends(self, tmp_path: Path) -> None:
        with serving("--tier", f"file://{tmp_path}/data?max_bytes=1GiB", "--unix", f"{tmp_path}/socket") as server:
            for word in (server.url, f"lm+unix://{tmp_path}/socket", "file tier", "1.00 GiB"):
                assert word in server.line
            with Client(f"{tmp_path}/socket") as one, server.client() as two:
                assert one.put(b"body")
                assert two.get() == b"body"
            assert server.end()[0] == 0
            assert not (tmp_path / "socket").exists()

    def test_the_environment(self, tmp_path: Path) -> None:
        settings = {"TIER": "memory://?max_bytes=512MiB", "UNIX": f"{tmp_path}/socket", "MAX_CONNECTIONS": "1"}
        with serving(**{f"AGNOSTIC_CACHE_{name}": value for name, value in settings.items()}) as server:
            assert "0.50 GiB" in server.line
            with Client(f"{tmp_path}/socket") as one, server.client() as two:
                assert two.is_closed()
                assert one.put(b"body")

    def test_tiers(self, tmp_path: Path) -> None:
        tiers = ("--tier", "memory://?max_bytes=4MiB", "--tier", f"file://{tmp_path}/data?max_bytes=1GiB")
        with serving(*tiers, "--metrics-port", "0") as server, server.client() as client:
            assert "memory tier, 0.00 GiB" in server.line
            assert "file tier, 1.00 GiB" in server.line
            for i in range(12):
                assert client.put(bytes([i]) * MIB, b"m@1@0@%x@half" % i)
            assert client.put(bytes(9 * MIB), b"m@1@0@ff@half")  # more than the first holds
            for i in range(12):
                assert client.get(b"m@1@0@%x@half" % i) == bytes([i]) * MIB
            assert client.get(b"m@1@0@ff@half") == bytes(9 * MIB)
            base = server.line.partition("http://")[2].partition("/")[0]
            told = urllib.request.urlopen(f"http://{base}/metrics", timeout=20).read().decode()
            assert 'agnostic_cache_entries{tier="file"} 13.0' in told
            assert 'agnostic_cache_max_bytes{tier="memory"}' in told
            assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        with serving(*tiers) as server, server.client() as client:
            for i in range(12):
                assert client.get(b"m@1@0@%x@half" % i) == bytes([i]) * MIB

    def test_metrics_and_health(self) -> None:
        with serving("--tier", "memory://?max_bytes=64MiB&evictor=fifo", "--metrics-port", "0") as server:
            base = server.line.partition("http://")[2].partition("/")[0]

            def page(name: str) -> str:
                with urllib.request.urlopen(f"http://{base}/{name}", timeout=20) as answer:
                    assert answer.status == 200
                    return str(answer.read(), "utf-8")

            assert base.startswith("127.0.0.1:")
            assert page("healthz") == "ok\n"
            with server.client() as client:
                for i in range(80):
                    client.put(bytes(MIB), b"m@1@0@%x@half" % i)
                client.get(b"m@1@0@4f@half")
                client.get(b"m@1@0@0@half")
            wanted = [
                'agnostic_cache_requests_total{op="put",result="stored",tier="server"} 80.0',
                'agnostic_cache_requests_total{op="get",result="hit",tier="server"} 1.0',
                'agnostic_cache_requests_total{op="get",result="miss",tier="server"} 1.0',
                'agnostic_cache_op_duration_seconds_count{op="put"} 80.0',
                'agnostic_cache_max_bytes{tier="memory"} 6.7108864e+07',
                'agnostic_cache_evictions_total{policy="fifo",reason="budget",tier="memory"}',
                'agnostic_cache_entries{tier="memory"}',
                'agnostic_cache_bytes{tier="memory"}',
            ]
            until(lambda: all(line in page("metrics") for line in wanted))
            until(lambda: "agnostic_cache_connections 0.0" in page("metrics"))
            with server.client(), server.client():
                until(lambda: "agnostic_cache_connections 2.0" in page("metrics"))
            with pytest.raises(urllib.error.HTTPError):
                page("etc/passwd")

    def test_a_server_that_hangs_is_not_healthy(self) -> None:
        with serving("--metrics-port", "0") as server:
            base = server.line.partition("http://")[2].partition("/")[0]
            server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(OSError):
                urllib.request.urlopen(f"http://{base}/healthz", timeout=0.3).read()
            server.process.send_signal(signal.SIGCONT)
            with urllib.request.urlopen(f"http://{base}/healthz", timeout=20) as answer:
                assert answer.read() == b"ok\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--port", "{taken}"),
            ("--port", "0", "--metrics-port", "{taken}"),
            ("--host", "0.0.0.0"),  # noqa: S104 - refused
            ("--host", "192.0.2.1", "--insecure"),
            ("--tier", "gpu"),
            ("--tier", "nowhere://host"),
            ("--tier", "memory://?max_bytes=lots"),
            ("--tier", "memory://?colour=red"),
            ("--tier", "file:///proc/nowhere"),
            ("--tier", "memory://", "--tier", "gpu"),
            ("--tier", "redis+unix:///nowhere"),
            ("--unix", "/nowhere/socket"),
            ("--tls-cert", "/nowhere"),
            ("--tls-cert", "/nowhere", "--tls-key", "/nowhere", "--client-ca", "/nowhere"),
            ("--max-waiting", "lots"),
        ],
        ids=" ".join,
    )
    def test_what_is_wrong_is_said_in_a_line(self, arguments: tuple[str, ...]) -> None:
        with serving() as server:
            filled = [argument.format(taken=server.port) for argument in arguments]
            command = [sys.executable, "-m", "agnostic_cache.cli", "serve", "--port", "0", *filled]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("agnostic-cache serve: ")
        assert not done.stdout

    def test_passwords_are_not_said(self) -> None:
        command = [sys.executable, "-m", "agnostic_cache.cli", "serve", "--tier", "nowhere://user:secret@host"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "secret" not in done.stderr + done.stdout
