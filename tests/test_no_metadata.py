"""No installed metadata is needed: a source tree, a zip, a vendored copy and a frozen program have it all."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

import agnostic_cache
import agnostic_cache_adapters

CORE, ADAPTERS = Path(agnostic_cache.__file__).parent, Path(agnostic_cache_adapters.__file__).parent
FRAMEWORK = """
from agnostic_cache.arrays.host import HostArray
class Tensor(HostArray): ...
"""
ADAPTER = """
import torch
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.registry import offer_adapter
class TorchAdapter(HostAdapter):
    framework = "torch"
    def is_array(self, value): return isinstance(value, torch.Tensor)
adapter = TorchAdapter()
offer_adapter("torch", adapter)
"""
STATES = """
import torch
from agnostic_cache import StateCache
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.registry import adapter_for
state = {"x": torch.Tensor.empty((4,), Dtype.INT8)}
assert adapter_for(state).framework == "torch"
cache = StateCache("1MiB")
cache.put("a", state)
assert cache.get("a")
"""
STORAGES = """
import sys
from agnostic_cache import __version__, open_storage
from agnostic_cache.errors import MissingExtraError, StorageURLError
from agnostic_cache.blob.producer import PRODUCER
assert __version__ in PRODUCER
for url in ("memory://", f"file://{sys.argv[1]}/kv"):
    with open_storage(url) as storage:
        storage.put("a", b"1")
        assert bytes(storage.get("a")) == b"1"
try:
    open_storage("redis://127.0.0.1:1")
except MissingExtraError:
    pass
try:
    open_storage("carrier-pigeon://loft")
except StorageURLError:
    sys.exit()
sys.exit("a carrier pigeon")
"""
FROZEN = """
import sys
sys.modules["importlib.metadata"] = None
"""


def source_tree(place: Path) -> list[Path]:
    shutil.copytree(CORE, place / CORE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ADAPTERS, place / "adapters" / ADAPTERS.name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "adapters" / ADAPTERS.name / "torch.py").write_text(ADAPTER)
    (place / "torch.py").write_text(FRAMEWORK)
    return [place, place / "adapters"]


def zipped(place: Path) -> list[Path]:
    with ZipFile(place / "all.zip", "w") as archive:
        for folder in source_tree(place / "tree"):
            for file in folder.rglob("*.py"):
                if "adapters" not in file.relative_to(folder).parts:
                    archive.write(file, file.relative_to(folder))
    shutil.rmtree(place / "tree")
    return [place / "all.zip"]


def vendored(place: Path) -> list[Path]:
    """Make both packages those of ``vendor``, as tools that vendor do: by their import statements."""
    source_tree(place / "vendor")
    shutil.move(place / "vendor" / "adapters" / ADAPTERS.name, place / "vendor" / ADAPTERS.name)
    shutil.move(place / "vendor" / "torch.py", place / "torch.py")
    for file in place.rglob("*.py"):
        file.write_text(rewritten(file.read_text()))
    return [place]


def rewritten(code: str) -> str:
    return re.sub(r"^( *(?:from|import)) agnostic_cache", r"\1 vendor.agnostic_cache", code, flags=re.MULTILINE)


def run(code: str, path: list[Path], *arguments: object) -> None:
    """Run code in an interpreter that has no packages but those of `path`, and so no metadata."""
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=path[0].parent)


@pytest.mark.parametrize("before", ["", FROZEN], ids=["unfrozen", "frozen"])
@pytest.mark.parametrize("copy", [source_tree, zipped, vendored])
def test_a_copy_has_adapters_and_storages(tmp_path: Path, copy: Callable[[Path], list[Path]], before: str) -> None:
    path = copy(tmp_path)
    for code in (STATES, STORAGES):
        run(before + (rewritten(code) if copy is vendored else code), path, tmp_path)


def test_a_copy_of_the_core_alone_serves_what_is_there(tmp_path: Path) -> None:
    tree, _ = source_tree(tmp_path)
    run(
        """
import torch
from agnostic_cache import wrap
from agnostic_cache.errors import MissingAdapterError
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.registry import adapter_named
assert wrap([HostArray.empty((4,), Dtype.INT8)]).framework == "host"
try:
    adapter_named("torch")
except MissingAdapterError:
    raise SystemExit
raise SystemExit("an adapter from nowhere")
""",
        [tree],
    )


def test_an_adapter_that_is_imported_is_there(tmp_path: Path) -> None:
    """Where its framework is not in `sys.modules` under its name, and no table has it."""
    run(
        """
import sys
from agnostic_cache.arrays import registry
registry.OWN_ADAPTERS = {}
import agnostic_cache_adapters.torch
tensor = sys.modules.pop("torch").Tensor
from agnostic_cache.arrays.dtypes import Dtype
assert registry.adapter_for([tensor.empty((4,), Dtype.INT8)]).framework == "torch"
assert registry.adapter_named("torch") is agnostic_cache_adapters.torch.adapter
""",
        source_tree(tmp_path),
    )


def test_tokenizers_of_transformers_need_no_torch(tmp_path: Path) -> None:
    path = source_tree(tmp_path)
    (tmp_path / "transformers.py").write_text("")
    (tmp_path / "torch.py").unlink()
    run(
        """
import transformers
from agnostic_cache import wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
assert wrap([HostArray.empty((4,), Dtype.INT8)]).framework == "host"
""",
        path,
    )
