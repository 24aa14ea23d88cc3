"""Every check of this project, each in an environment that holds only what it names.

``nox`` runs all but `demo`, `bench`, `lm_eval` and `gpu`; ``nox -s jax`` runs one of them, ``nox -t tests`` those that
run tests. What follows ``--`` goes to pytest (``nox -s core -- -k lru``) or to the demo. Pythons, extras and groups are
read from pyproject.toml. The sessions install the wheel that this tree builds, so that packaging is tested with
everything else.
"""

import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import nox

nox.needs_version = ">=2026.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = "CI" in os.environ

PYPROJECT = nox.project.load_toml("pyproject.toml")
NAME, VERSION = PYPROJECT["project"]["name"], PYPROJECT["project"]["version"]
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
del EXTRAS["lm-eval"]  # a hundred packages more: the session `lm_eval` alone asks for it
FRAMEWORKS: list[str] = list(PYPROJECT["project"]["entry-points"]["agnostic_cache.adapters"])
PYTHONS = nox.project.python_versions(PYPROJECT)
STORAGE = ["cli", "redis", "xxhash", "zstd"]
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = {"agnostic_cache", "agnostic_cache_adapters"}
# Modules that import what an extra brings: their doctests run in the sessions `storage`, `server` and `replay`.
BEHIND_EXTRAS = (
    "agnostic_cache/cli/*",
    "agnostic_cache/metrics.py",
    "agnostic_cache/server/monitor.py",
    "agnostic_cache/storage/byteplanes.py",
    "agnostic_cache/storage/redis*.py",
    "agnostic_cache_adapters/transformers/lm_eval.py",
)

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # to what Hugging Face's libraries look up by themselves

# Run in an environment that holds the wheel and nothing else, not even pip.
BARE_IMPORT = """
import sys
import agnostic_cache, agnostic_cache_adapters
loaded = {name.partition(".")[0] for name in sys.modules}
foreign = loaded - sys.stdlib_module_names - {"__main__", "agnostic_cache", "agnostic_cache_adapters"}
sys.exit(f"not of the standard library: {sorted(foreign)}" if foreign else 0)
"""

built: list[Path] = []  # the wheel of this run of nox, once it is there


def group(name: str) -> tuple[str, ...]:
    """Return the requirements of a dependency group."""
    return nox.project.dependency_groups(PYPROJECT, name)


def install(session: nox.Session, *requirements: str, extras: Iterable[str] = ()) -> None:
    """Install the wheel with `extras`, built once in a run of nox, and what else the session names."""
    # pip spends most of its time compiling every module of a framework; Python compiles those that it imports.
    session.env["PYTHONDONTWRITEBYTECODE"] = None
    wheel = session.cache_dir.resolve() / "dist" / f"{NAME.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel not in built:
        session.run_install("pip", "wheel", "--no-deps", "--wheel-dir", str(wheel.parent), ".", silent=True)
        built.append(wheel)
    ours = f"{NAME}[{','.join(extras)}] @ {wheel.as_uri()}"
    session.install("--no-compile", "--constraint=constraints.txt", ours, *requirements)
    session.install("--no-deps", "--force-reinstall", str(wheel))  # same version, new contents, where nox reuses a venv


def programs(session: nox.Session, *names: str) -> None:
    """Stop where a program that the tests start is not there."""
    if missing := [name for name in names if not shutil.which(name)]:
        session.error(f"no {' and no '.join(missing)}; on Debian: apt-get install redis-server openssl")


def test(session: nox.Session, room: str, *adapters: str, without: str = "") -> None:  # noqa: PT028 - no test itself
    """Run the tests of a room, the facts that it rests on, and the doctests of its modules.

    An adapter that does not import is a failure.
    """
    modules = [f"agnostic_cache_adapters.{adapter}" for adapter in adapters] or ["agnostic_cache"]
    session.run("python", "-P", "-c", f"import {', '.join(modules)}")
    facts = map(str, Path("tests/facts").glob(f"test_{room}_facts.py"))
    doctests = ["--doctest-modules", *(f"--ignore-glob=*/{module}" for module in BEHIND_EXTRAS)]
    # One thread per worker: the models of the tests are tiny, and threads that wait for one another cost more.
    workers = ["-n", "2", "--dist", "worksteal"]
    chosen = ["-k", f"not {without}"] if without else []
    arguments = [f"tests/{room}", *facts, *doctests, *workers, *chosen, "--pyargs", *modules, *session.posargs]
    session.run("pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(tags=["checks"])
def lint(session: nox.Session) -> None:
    """Ruff's rules and format; the arrows between the rooms."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "adapters"})


@nox.session(tags=["checks"])
def package(session: nox.Session) -> None:
    """Build sdist and wheel, look into the wheel, import it where there is nothing else."""
    session.install("build")
    folder = Path(session.create_tmp())
    session.run("python", "-m", "build", "--outdir", str(folder / VERSION), silent=True)
    [sdist], [wheel] = ((folder / VERSION).glob(f"*{ending}") for ending in (".tar.gz", ".whl"))
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        shipped = {member.name.partition("/")[2] for member in source}
    if (top := {name.partition("/")[0] for name in names}) != PACKAGES:
        session.error(f"top level of the wheel: {sorted(top)}")
    missing = {f"{name}/py.typed" for name in PACKAGES} - names
    missing |= {"CHANGELOG.md", "LICENSE", "adapters/README.md", "constraints.txt", "noxfile.py", "tests"} - {
        *shipped,
        *(name.partition("/")[0] for name in shipped),
    }
    if missing:
        session.error(f"missing from the wheel or the sdist: {sorted(missing)}")
    bare = folder / "bare"
    session.run("python", "-m", "venv", "--clear", "--without-pip", str(bare))
    session.run("python", "-m", "pip", "--python", str(bare), "install", "--no-index", str(wheel))
    session.run(str(bare / "bin" / "python"), "-I", "-c", BARE_IMPORT, external=True)


@nox.session(tags=["checks"])
def types(session: nox.Session) -> None:
    """Mypy and pyright, on sources, tests and examples, with every framework there."""
    install(session, *group("types"), extras=EXTRAS)
    session.run("mypy")
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session(python=PYTHONS, tags=["tests"])
def core(session: nox.Session) -> None:
    """The core on every Python: no framework, no numpy."""
    install(session, *group("test"))
    test(session, *CORE)


@nox.session(tags=["tests", "frameworks"])
def torch(session: nox.Session) -> None:
    """PyTorch tensors."""
    install(session, *group("test"), extras=["torch"])
    test(session, "torch", "torch")


@nox.session(tags=["tests", "frameworks"])
def transformers(session: nox.Session) -> None:
    """Caches of Hugging Face transformers."""
    install(session, *group("test"), extras=["transformers"])
    test(session, "transformers", "transformers")


@nox.session(python=sorted({THIS_PYTHON, PYTHONS[-1]}), tags=["tests", "frameworks"])
def jax(session: nox.Session) -> None:
    """JAX pytrees; on the newest Python too, which gets a newer JAX."""
    install(session, *group("test"), extras=["jax"])
    test(session, "jax", "jax")


@nox.session(tags=["tests", "frameworks"])
def flax(session: nox.Session) -> None:
    """Flax, linen and nnx."""
    install(session, *group("test"), extras=["flax"])
    test(session, "flax", "flax")


@nox.session(tags=["tests", "frameworks"])
def interop(session: nox.Session) -> None:
    """From each framework to each other: in one process, and between processes, through a disk and a Redis."""
    programs(session, "redis-server")
    install(session, *group("test"), extras=EXTRAS)
    test(session, "interop", *FRAMEWORKS)


@nox.session(tags=["tests"])
def storage(session: nox.Session) -> None:
    """States as bytes, and where they are kept: files, and a real Redis that the tests start."""
    programs(session, "redis-server", "redis-cli", "openssl")
    install(session, *group("storage"), extras=STORAGE)
    session.run("pytest", "tests/storage", "--doctest-modules", "--pyargs", "agnostic_cache.storage", *session.posargs)


@nox.session(python=[PYTHONS[0], PYTHONS[-1]], tags=["tests"])
def server(session: nox.Session) -> None:
    """The cache server, on the oldest and the newest asyncio; a million broken headers."""
    install(session, *group("server"), extras=["cli", "metrics"])
    modules = ["--pyargs", "agnostic_cache.server", "agnostic_cache.metrics"]
    session.run("pytest", "tests/server", "--doctest-modules", *modules, *session.posargs)


@nox.session(tags=["tests"])
def lmcache(session: nox.Session) -> None:
    """LMCache's own client against our server, and our client against LMCache's own server."""
    install(session, *group("lmcache"), extras=["transformers"])
    session.install("--no-compile", "--no-deps", *group("lmcache-bare"))
    session.run("pytest", "tests/lmcache", *session.posargs, env={"LMCACHE_TRACK_USAGE": "false"})


@nox.session(tags=["tests"])
def mellea(session: nox.Session) -> None:
    """The real mellea on a tiny local model: 65 packages, and an import of torch's compiler, take a minute."""
    install(session, *group("mellea"), extras=["transformers"])
    test(session, "mellea", "transformers")


@nox.session(default=False)
def lm_eval(session: nox.Session) -> None:
    """lm-eval with few-shot examples computed once, against its own `hf` model; 100 packages, two minutes and more."""
    install(session, *group("test"), extras=["lm-eval"])
    session.run("pytest", "tests/lm_eval", *session.posargs, env={**OFFLINE, "OMP_NUM_THREADS": "1"})


@nox.session(default=False, venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """A CUDA device, with the torch and the JAX of this machine; fails where there is none."""
    install(session, *group("test"))
    session.run("python", "-c", "import jax, torch; torch.zeros(1, device='cuda'); jax.devices('gpu')")
    test(session, "gpu", "torch", "jax")


@nox.session(tags=["tests"])
def replay(session: nox.Session) -> None:
    """The replay of traces, as a program; policies against libCacheSim."""
    install(session, *group("replay"), extras=["plot"])
    session.run("pytest", "tests/replay", "--doctest-modules", "--pyargs", "agnostic_cache.cli", *session.posargs)


@nox.session(python=PYTHONS[0], tags=["tests"])
def minimums(session: nox.Session) -> None:
    """The lowest versions that the extras promise."""
    promised = {requirement for extra in EXTRAS.values() for requirement in extra if not requirement.startswith(NAME)}
    floors = sorted(requirement.replace(">=", "==") for requirement in promised)
    install(session, *floors, *group("test"), extras=EXTRAS)
    stress = "what_others_evict"  # 100,000 reads each: once per framework, on its newest version, are enough
    for framework in FRAMEWORKS:
        test(session, framework, framework, without=stress)
    programs(session, "redis-server")
    test(session, "interop", *FRAMEWORKS, without=stress)
    session.run("pytest", "tests/replay/test_cli.py")


@nox.session(default=False, reuse_venv=True)
def demo(session: nox.Session) -> None:
    """A real model in PyTorch, in JAX, and across the two; `-- --json PATH --plot PATH` writes the figures."""
    install(session, *group("demo"), extras=EXTRAS)
    session.install("--no-compile", "--no-deps", *group("demo-bare"))
    session.run("python", "docs/examples/demo.py", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Every figure that the docs give, as a ratio in one run; `-- --benchmark-disable` only checks the results."""
    install(session, *group("bench"), extras=["transformers", "jax", *STORAGE])
    session.install("--no-compile", "--no-deps", *group("bench-bare"))
    elsewhere = (f"--ignore=tests/benchmarks/test_{name}.py" for name in ("server", "lm_eval"))
    session.run("pytest", "tests/benchmarks", *elsewhere, *session.posargs)


@nox.session(default=False, reuse_venv=True)
def bench_server(session: nox.Session) -> None:
    """Our server against LMCache's own; what these two need does not go with what `bench` needs."""
    install(session, *group("lmcache"), "pytest-benchmark>=5.2", extras=["cli", "transformers"])
    session.install("--no-compile", "--no-deps", *group("lmcache-bare"))
    session.run("pytest", "tests/benchmarks/test_server.py", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def bench_lm_eval(session: nox.Session) -> None:
    """Few-shot questions of lm-eval with a cache, against its own `hf` model."""
    install(session, *group("bench"), extras=["lm-eval"])
    session.install("--no-compile", "--no-deps", *group("bench-bare"))
    session.run("pytest", "tests/benchmarks/test_lm_eval.py", *session.posargs, env=OFFLINE)
