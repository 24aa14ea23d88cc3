"""Every check of this project, each in an environment that holds only what it names.

``python -m nox`` runs the default tier, ``nox -t full`` what CI runs, ``nox -s NAME`` one session; CONTRIBUTING.md has
the table of tiers. Arguments behind ``--`` go to pytest (``nox -s torch -- -k copy``) or to the demo. Sessions install
the wheel that this tree builds, and everything else from a committed lock (``locks/``, for Linux, made by
``nox -s lock``); ``-- --no-lock`` installs what the package index has today.
"""

import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2026.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = "CI" in os.environ

PYPROJECT = nox.project.load_toml("pyproject.toml")
NAME = PYPROJECT["project"]["name"]
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
PYTHONS = tuple(nox.project.python_versions(PYPROJECT))
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
FRAMEWORKS = ("torch", "transformers", "jax", "flax")
PACKAGES = {"agnostic_cache", "agnostic_cache_adapters"}
# Packages of the core whose tests need the standard library alone, with the tests at the top.
CORE = ("arrays", "blob", "eviction", "held", "prefix", "process", "state", "storage", "wire")
# Modules that import what an extra brings: their doctests run in the sessions `storage`, `server` and `replay`.
BEHIND_EXTRAS = (
    "agnostic_cache/cli/*",
    "agnostic_cache/metrics.py",
    "agnostic_cache/server/monitor.py",
    "agnostic_cache/storage/byteplanes.py",
    "agnostic_cache/storage/redis*.py",
    "agnostic_cache_adapters/transformers/lm_eval.py",
)


class Needs(NamedTuple):
    """What a session installs besides the wheel.

    Attributes:
        groups: Dependency groups of pyproject.toml.
        extras: Extras of this package.
        bare: A group whose packages are pinned there and installed without what they ask for.
        pythons: The Pythons that there are locks for.
        floors: Install the lowest versions that the extras promise.
    """

    groups: tuple[str, ...] = ("test",)
    extras: tuple[str, ...] = ()
    bare: str = ""
    pythons: tuple[str, ...] = PYTHONS[:1]
    floors: bool = False


STORAGE = ("cli", "redis", "xxhash", "zstd")
ALL = tuple(extra for extra in EXTRAS if extra != "lm-eval")  # that one brings a hundred packages more
NEEDS = {
    "nox": Needs(("nox",)),  # no session: what runs them
    "lint": Needs(("lint",)),
    "package": Needs(("build",), pythons=PYTHONS),
    "types": Needs(("types",), ALL),
    "core": Needs(pythons=PYTHONS),
    "torch": Needs(extras=("torch",)),
    "transformers": Needs(extras=("transformers",)),
    "jax": Needs(extras=("jax",), pythons=PYTHONS),
    "flax": Needs(extras=("flax",)),
    "interop": Needs(extras=ALL),
    "storage": Needs(("storage",), STORAGE),
    "server": Needs(("server",), ("cli", "metrics"), pythons=PYTHONS),
    "lmcache": Needs(("lmcache",), ("transformers",), "lmcache-bare"),
    "mellea": Needs(("mellea",), ("transformers",)),
    "replay": Needs(("replay",), ("plot",)),
    "minimums": Needs(extras=ALL, floors=True),
    "demo": Needs(("demo",), ALL, "demo-bare"),
    "bench": Needs(("bench",), ("transformers", "jax", *STORAGE), "bench-bare"),
    "bench_server": Needs(("lmcache", "bench-server"), ("cli", "transformers"), "lmcache-bare"),
    "bench_lm_eval": Needs(("bench",), ("lm-eval",), "bench-bare"),
    "lm_eval": Needs(extras=("lm-eval",)),
    "gpu": Needs(),
}
LOCKS = Path("locks")
BUILD_LOCK = LOCKS / f"package-{THIS_PYTHON}.txt"  # hatchling, which builds the wheel

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # to what Hugging Face's libraries look up by themselves

# The default tier: what the README calls the tests, on the Python that runs nox.
nox.options.sessions = [
    *("lint", "package", f"core-{THIS_PYTHON}", "torch", "transformers", f"jax-{THIS_PYTHON}", "flax"),
    *("interop", "storage", f"server-{THIS_PYTHON}"),
]

# Run in an environment that holds the wheel and nothing else, not even pip.
BARE_IMPORT = """
import sys
import agnostic_cache, agnostic_cache_adapters
loaded = {name.partition(".")[0] for name in sys.modules}
foreign = loaded - sys.stdlib_module_names - {"__main__", "agnostic_cache", "agnostic_cache_adapters"}
sys.exit(f"not of the standard library: {sorted(foreign)}" if foreign else 0)
"""

built: list[Path] = []  # the wheel of this run of nox, once it is there


# --- what sessions install --------------------------------------------------------------------------------------------


def group(name: str) -> tuple[str, ...]:
    """Return the requirements of a dependency group."""
    return nox.project.dependency_groups(PYPROJECT, name)


def of_extras(extras: Iterable[str]) -> Iterator[str]:
    """Yield what extras of this package ask for, in place of their references to one another."""
    for extra in extras:
        for requirement in EXTRAS[extra]:
            asked = Requirement(requirement)
            if canonicalize_name(asked.name) == NAME:
                yield from of_extras(sorted(asked.extras))
            else:
                yield requirement


def asked_by(needs: Needs) -> list[str]:
    """Return the requirements of a session, from which its lock is made."""
    promised = set(of_extras(needs.extras))
    if needs.floors:
        promised = {requirement.replace(">=", "==") for requirement in promised}
    return sorted({*promised, *(requirement for name in needs.groups for requirement in group(name))})


def lock_of(session: nox.Session, name: str) -> Path:
    """Return the lock of a session for the Python that it runs on; stop where it has none that fits."""
    python = session.python if isinstance(session.python, str) else THIS_PYTHON
    lock = LOCKS / f"{name}-{python}.txt"
    if sys.platform != "linux" or not lock.exists():
        session.error(f"no lock of {name} for Python {python} on {sys.platform}; install today's: nox ... -- --no-lock")
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock.read_text("utf-8"), re.MULTILINE))
    for requirement in map(Requirement, asked_by(NEEDS[name])):
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        if not requirement.specifier.contains(found := pins.get(canonicalize_name(requirement.name), "none")):
            session.error(f"{lock} has {requirement.name} {found}, pyproject.toml asks for {requirement}: nox -s lock")
    return lock


def install(session: nox.Session, name: str = "", *, wheel: bool = True) -> list[str]:
    """Install what this session, or the one called `name`, needs, and the wheel; return what stands behind ``--``."""
    # pip spends most of its time compiling every module of a framework; Python compiles those that it imports.
    session.env["PYTHONDONTWRITEBYTECODE"] = None
    name = name or session.name.partition("-")[0]
    needs, arguments = NEEDS[name], list(session.posargs)
    if "--no-lock" in arguments:
        arguments.remove("--no-lock")
        session.install("--no-compile", "--constraint=constraints.txt", *asked_by(needs))
    else:
        session.install("--no-compile", "--requirement", str(lock_of(session, name)))
    if needs.bare:
        session.install("--no-compile", "--no-deps", *group(needs.bare))
    if wheel:
        folder = session.cache_dir.resolve() / "dist"
        if not built:
            shutil.rmtree(folder, ignore_errors=True)
            how = ["--no-deps", "--wheel-dir", str(folder)]
            if BUILD_LOCK.exists():
                how.append(f"--build-constraint={BUILD_LOCK}")
            session.run_install("pip", "wheel", *how, ".", silent=True)
            built.extend(folder.glob("*.whl"))
        # Same version, new contents, where nox reuses an environment.
        session.install("--no-deps", "--force-reinstall", *map(str, built))
    return arguments


def programs(session: nox.Session, *names: str) -> None:
    """Stop where a program that the tests start is not there."""
    if missing := [name for name in names if not shutil.which(name)]:
        session.error(f"no {' and no '.join(missing)}; on Debian: apt-get install redis-server openssl")


def test(
    session: nox.Session,
    folders: Sequence[str],
    adapters: Sequence[str],
    arguments: Sequence[str],
    without: str = "",  # noqa: PT028 - no test itself
) -> None:
    """Run the tests of folders, the facts about their frameworks, and the doctests of the modules under test.

    An adapter that does not import is a failure.
    """
    modules = [f"agnostic_cache_adapters.{adapter}" for adapter in adapters] or ["agnostic_cache"]
    session.run("python", "-P", "-c", f"import {', '.join(modules)}")
    paths = [f"tests/{folder}" for folder in folders]
    paths += [str(path) for folder in folders for path in Path("tests/facts").glob(f"test_{folder}_facts.py")]
    doctests = ["--doctest-modules", *(f"--ignore-glob=*/{module}" for module in BEHIND_EXTRAS)]
    # One thread per worker: the models of the tests are tiny, and threads that wait for one another cost more.
    workers = ["-n", "2", "--dist", "worksteal"]
    chosen = ["-k", f"not {without}"] if without else []
    session.run(
        "pytest", *paths, *doctests, *workers, *chosen, "--pyargs", *modules, *arguments, env={"OMP_NUM_THREADS": "1"}
    )


# --- the default tier, and the other Pythons of it --------------------------------------------------------------------


@nox.session(tags=["full"])
def lint(session: nox.Session) -> None:
    """Ruff's rules and format; the arrows between the packages."""
    install(session, wheel=False)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "adapters"})


@nox.session(tags=["full"])
def package(session: nox.Session) -> None:
    """Build sdist and wheel, look into the wheel, import it where there is nothing else."""
    install(session, wheel=False)
    folder = Path(session.create_tmp())
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), silent=True)
    [sdist], [wheel] = ((folder / "dist").glob(f"*{ending}") for ending in (".tar.gz", ".whl"))
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        shipped = {member.name.partition("/")[2] for member in source}
    if (top := {name.partition("/")[0] for name in names}) != PACKAGES:
        session.error(f"top level of the wheel: {sorted(top)}")
    missing = {f"{name}/py.typed" for name in PACKAGES} - names
    missing |= {"CHANGELOG.md", "LICENSE", "adapters/README.md", "constraints.txt", "locks", "noxfile.py", "tests"} - {
        *shipped,
        *(name.partition("/")[0] for name in shipped),
    }
    if missing:
        session.error(f"missing from the wheel or the sdist: {sorted(missing)}")
    bare = folder / "bare"
    session.run("python", "-m", "venv", "--clear", "--without-pip", str(bare))
    session.run("python", "-m", "pip", "--python", str(bare), "install", "--no-index", str(wheel))
    session.run(str(bare / "bin" / "python"), "-I", "-c", BARE_IMPORT, external=True)


@nox.session(python=PYTHONS, tags=["full"])
def core(session: nox.Session) -> None:
    """The core on every Python: no framework, no numpy."""
    arguments = install(session)
    top = (path.name for path in sorted(Path("tests").glob("test_*.py")))
    test(session, [*CORE, "replay/test_replay.py", *top], [], arguments)


@nox.session(tags=["full"])
def torch(session: nox.Session) -> None:
    """PyTorch tensors."""
    test(session, ["torch"], ["torch"], install(session))


@nox.session(tags=["full"])
def transformers(session: nox.Session) -> None:
    """Caches of Hugging Face transformers."""
    test(session, ["transformers"], ["transformers"], install(session))


@nox.session(python=PYTHONS, tags=["full"])
def jax(session: nox.Session) -> None:
    """JAX pytrees; newer Pythons get a newer JAX."""
    test(session, ["jax"], ["jax"], install(session))


@nox.session(tags=["full"])
def flax(session: nox.Session) -> None:
    """Flax, linen and nnx."""
    test(session, ["flax"], ["flax"], install(session))


@nox.session(tags=["full"])
def interop(session: nox.Session) -> None:
    """From each framework to each other: in one process, and between processes, through a disk and a Redis."""
    programs(session, "redis-server")
    test(session, ["interop"], FRAMEWORKS, install(session))


@nox.session(tags=["full"])
def storage(session: nox.Session) -> None:
    """States as bytes, and where they are kept: files, and a real Redis that the tests start."""
    programs(session, "redis-server", "redis-cli", "openssl")
    arguments = install(session)
    session.run("pytest", "tests/extras", "--doctest-modules", "--pyargs", "agnostic_cache.storage", *arguments)


@nox.session(python=PYTHONS, tags=["full"])
def server(session: nox.Session) -> None:
    """The cache server; a million broken headers."""
    modules = ["--pyargs", "agnostic_cache.server", "agnostic_cache.metrics"]
    session.run("pytest", "tests/server", "--doctest-modules", *modules, *install(session))


# --- the full tier ----------------------------------------------------------------------------------------------------


@nox.session(tags=["full"])
def types(session: nox.Session) -> None:
    """Mypy and pyright, on sources, tests and examples, with every framework there."""
    install(session)
    session.run("mypy")
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session(tags=["full"])
def lmcache(session: nox.Session) -> None:
    """LMCache's own client against our server, and our client against LMCache's own server."""
    session.run("pytest", "tests/lmcache", *install(session), env={"LMCACHE_TRACK_USAGE": "false"})


@nox.session(tags=["full"])
def mellea(session: nox.Session) -> None:
    """The real mellea on a tiny local model: 65 packages, and an import of torch's compiler, take a minute."""
    test(session, ["mellea"], ["transformers"], install(session))


@nox.session(tags=["full"])
def replay(session: nox.Session) -> None:
    """The replay of traces, as a program; policies against libCacheSim."""
    arguments = install(session)
    session.run("pytest", "tests/replay", "--doctest-modules", "--pyargs", "agnostic_cache.cli", *arguments)


@nox.session(python=PYTHONS[0], tags=["full"])
def minimums(session: nox.Session) -> None:
    """The lowest versions that the extras promise."""
    programs(session, "redis-server")
    arguments = install(session)
    stress = "what_others_evict"  # 100,000 reads each: once per framework, on its newest version, are enough
    for framework in FRAMEWORKS:
        test(session, [framework], [framework], arguments, without=stress)
    test(session, ["interop"], FRAMEWORKS, arguments, without=stress)
    session.run("pytest", "tests/replay/test_cli.py", *arguments)


@nox.session(tags=["full"], reuse_venv=True)
def demo(session: nox.Session) -> None:
    """A real model in PyTorch, in JAX, and across the two; `-- --json PATH --plot PATH` writes the figures."""
    session.run("python", "docs/examples/demo.py", *install(session))


@nox.session(tags=["full"])
def benchmarks(session: nox.Session) -> None:
    """Each benchmark of `bench` once, untimed: its result is checked."""
    _bench(session, "--benchmark-disable")


# --- by name only -----------------------------------------------------------------------------------------------------


@nox.session(reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Every figure that the docs give, as a ratio in one run."""
    _bench(session)


def _bench(session: nox.Session, *options: str) -> None:
    arguments = install(session, "bench")
    elsewhere = (f"--ignore=tests/benchmarks/test_{name}.py" for name in ("server", "lm_eval"))
    session.run("pytest", "tests/benchmarks", *elsewhere, *options, *arguments)


@nox.session(reuse_venv=True)
def bench_server(session: nox.Session) -> None:
    """Our server against LMCache's own; what these two need does not go with what `bench` needs."""
    session.run("pytest", "tests/benchmarks/test_server.py", *install(session))


@nox.session(reuse_venv=True)
def bench_lm_eval(session: nox.Session) -> None:
    """Few-shot questions of lm-eval with a cache, against its own `hf` model."""
    session.run("pytest", "tests/benchmarks/test_lm_eval.py", *install(session), env=OFFLINE)


@nox.session
def lm_eval(session: nox.Session) -> None:
    """lm-eval with few-shot examples computed once, against its own `hf` model; 100 packages, two minutes and more."""
    session.run("pytest", "tests/lm_eval", *install(session), env={**OFFLINE, "OMP_NUM_THREADS": "1"})


@nox.session(venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """A CUDA device, with the torch and the JAX of this machine; fails where there is none."""
    arguments = install(session)
    session.run("python", "-c", "import jax, torch; torch.zeros(1, device='cuda'); jax.devices('gpu')")
    test(session, ["gpu"], ["torch", "jax"], arguments)


@nox.session(reuse_venv=True)
def architectures(session: nox.Session) -> None:
    """A tiny model of every type that transformers maps, through a cache and without; `-- TYPE ...` asks some alone.

    It compares docs/structures.md with what came of it; `-- --write` writes that, `-- --jobs N` asks N at one time.
    """
    arguments = install(session, "transformers")
    env = {"PYTHONPATH": "tests/subjects", "OMP_NUM_THREADS": "1"}
    session.run("python", "-P", "tests/architectures/sweep.py", *arguments, env=env)


@nox.session
def newest(session: nox.Session) -> None:
    """The sessions of frameworks without locks, on what the index has today, and one table of the results."""
    names = ["torch", "transformers", f"jax-{THIS_PYTHON}", "flax", "interop", "mellea"]
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "reports", ignore_errors=True)
    (folder / "reports").mkdir()
    rows = []
    for name in names:
        report, envs = folder / "reports" / f"{name}.xml", folder / "envs"
        asked = [sys.executable, "-m", "nox", "-r", "--envdir", str(envs), "-s", name]
        session.run(*asked, "--", "--no-lock", f"--junitxml={report}", external=True, success_codes=range(256))
        python = envs / name.replace(".", "-") / "bin" / "python"
        listed = session.run(str(python), "-m", "pip", "list", "--format=json", external=True, silent=True)
        versions = {each["name"]: each["version"] for each in json.loads(str(listed))}
        suites = [dict(suite.attrib) for suite in ET.parse(report).iter("testsuite")] if report.exists() else []  # noqa: S314 - pytest's own
        ran, failed, skipped = (sum(int(suite[of]) for suite in suites) for of in ("tests", "failures", "skipped"))
        failed += sum(int(suite["errors"]) for suite in suites)
        has = ", ".join(f"{name} {versions[name]}" for name in (*FRAMEWORKS, "mellea", "peft") if name in versions)
        rows.append((name, has, ran - failed - skipped if suites else "none ran", failed))
    session.log("\n".join(" | ".join(map(str, row)) for row in [("session", "packages", "passed", "failed"), *rows]))
    if wrong := [row[0] for row in rows if row[3] or row[2] == "none ran"]:
        session.error(f"failed on today's releases: {', '.join(wrong)}")


@nox.session(python=PYTHONS)
def lock(session: nox.Session) -> None:
    """Write `locks/` anew, on Linux: every pin that the sessions install, from the newest that the index has today.

    `-- NAME ...` writes the locks of these sessions only.
    """
    session.install("pip-tools==7.6.2")
    LOCKS.mkdir(exist_ok=True)
    for name, needs in NEEDS.items():
        if session.python not in needs.pythons or (session.posargs and name not in session.posargs):
            continue
        asked = Path(session.create_tmp()) / f"{name}.in"
        asked.write_text("\n".join([*asked_by(needs), ""]), "utf-8")
        out = LOCKS / ("nox.txt" if name == "nox" else f"{name}-{session.python}.txt")
        out.unlink(missing_ok=True)
        quiet = ("--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links")
        how = (*quiet, "--strip-extras", "--allow-unsafe", "--constraint=constraints.txt", f"--output-file={out}")
        session.run("pip-compile", *how, str(asked), silent=True)
        # A build of one machine ("2.13.0+cpu") is that release on another.
        lines = [re.sub(r"\+[a-z0-9.]+$", "", line) for line in out.read_text("utf-8").splitlines()]
        note = f"# Made by `nox -s lock`: what `{name}` installs on Linux, with Python {session.python}."
        out.write_text("\n".join([note, *(line for line in lines if line and not line.startswith("#")), ""]), "utf-8")
