"""The kernel cache: it notices every change, survives damage and company, and never loads what others could have written."""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
NOBODY = 65534
unix_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")

# A kernel that is quick to build, and what became of it: built anew or loaded; numba imported or not; the warnings. The
# engine comes as a package of its own and with an empty torch, whose threads are not asked for: torch takes seconds to import.
NO_TORCH = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
"""
DOUBLE = (
    NO_TORCH
    + """
import ctypes, os, warnings
from engine import build

def make():
    from engine.simd import FLOAT64, inline, load_scalar, store_scalar
    @inline
    def twice(address):
        store_scalar(FLOAT64, address, 2.0 * load_scalar(FLOAT64, address))
    def double(address, n):
        for i in range(n):
            twice(address + 8 * i)
    return double

def run(name):
    values = (ctypes.c_double * 3)(1, 2, 3)
    build.Kernel(name, "ii", make)(ctypes.addressof(values), 3)
    return list(values)

if os.environ.get("BECOME"):  # import and read all that nobody else may read, then be somebody else
    os.environ["FASTNN_CACHE_DIR"], folder = "", os.environ["FASTNN_CACHE_DIR"]
    run("test_warm_up"), build.sources_digest()
    os.environ["FASTNN_CACHE_DIR"] = folder
    os.setegid(int(os.environ["BECOME"])), os.seteuid(int(os.environ["BECOME"]))

builds = []
compile = build._compile
build._compile = lambda *args: builds.append(args[0]) or compile(*args)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(run("test_double"))
print("built" if builds else "loaded", "numba" in sys.modules, *(w.message for w in caught), sep="\\n")
"""
)


def environment(cache: Path | str, root: Path = CHECKOUT, **more: str) -> dict[str, str]:
    return {
        "FASTNN_LAUNCHER": "python",
        **os.environ,
        "PYTHONPATH": str(root / "kernels" / "cpu"),
        "FASTNN_CACHE_DIR": str(cache),
        **more,
    }


def fresh(program: str, cache: Path | str, root: Path = CHECKOUT, umask: int = 0o022, **more: str) -> list[str]:
    """The lines that a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(cache, root, **more),
        umask=umask,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def double(cache: Path | str, root: Path = CHECKOUT, umask: int = 0o022, **more: str) -> tuple[str, bool, list[str]]:
    """(built or loaded, numba imported, warnings) of a fresh process that uses the cache."""
    values, what, numba, *warned = fresh(DOUBLE, cache, root, umask, **more)
    assert values == "[2.0, 4.0, 6.0]"
    return what, numba == "True", warned


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that does not exist yet, on a path that everybody may walk."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and str(folder).count("/") > 1:
            folder.chmod(folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    return tmp_path / "cache"


def objects(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.o"))


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "cache"
    assert double(folder) == ("built", True, [])
    return folder


@pytest.fixture
def ready(built_once: Path, cache: Path) -> Path:
    """A cache that has the kernel, modes and all."""
    return Path(shutil.copytree(built_once, cache))


def test_a_kernel_is_built_once_and_then_loaded_without_numba(cache: Path) -> None:
    assert double(cache) == ("built", True, [])
    (file,) = objects(cache)
    assert double(cache) == ("loaded", False, [])
    assert (file.stat().st_mode | file.parent.stat().st_mode) & 0o022 == 0
    assert cache.stat().st_mode & 0o077 == 0
    assert list(cache.rglob("*")) == [file.parent, file], "something was left lying about"


def test_a_lax_umask_does_not_open_the_cache(cache: Path) -> None:
    """Group-writable by default is what many distributions have; what we make is private all the same."""
    assert double(cache / "deep" / "er", umask=0o002) == ("built", True, [])
    assert double(cache / "deep" / "er", umask=0o002) == ("loaded", False, [])
    assert double(cache / "wide", umask=0) == ("built", True, [])
    assert double(cache / "wide", umask=0) == ("loaded", False, [])
    assert all(p.stat().st_mode & 0o022 == 0 for p in [*(cache / "wide").rglob("*"), cache / "wide"])


def sources() -> list[str]:
    root = CHECKOUT / "kernels" / "cpu"
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))


def test_a_change_in_any_source_changes_the_key(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""{NO_TORCH}
from pathlib import Path
from engine.build import sources_digest
root = Path({str(tmp_path)!r}) / "kernels" / "cpu"
def digest():
    sources_digest.cache_clear()
    return sources_digest()
first = digest()
assert digest() == first
seen = {{first}}
for name in {sources()!r}:
    path = root / name
    before = path.read_bytes()
    path.write_bytes(before + b"# changed")
    assert digest() not in seen, name
    seen.add(digest())
    path.write_bytes(before)
    assert digest() == first, name
(root / "engine" / "another.py").write_text("x = 1")
assert digest() not in seen
print(len(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment("", tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(sources()) + 1 > 10


def test_a_changed_engine_rebuilds(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    assert double(cache, tmp_path)[0] == "built"
    assert double(cache, tmp_path)[0] == "loaded"
    with (tmp_path / "kernels" / "cpu" / "engine" / "simd.py").open("a") as file:
        file.write("# another engine\n")
    assert double(cache, tmp_path)[0] == "built"
    assert len(objects(cache)) == 2


@pytest.mark.parametrize(("setting", "value"), [("FASTNN_SIMD", "portable"), ("FASTNN_LAUNCHER", "gomp")])
def test_the_settings_that_change_code_change_the_key(setting: str, value: str) -> None:
    code = NO_TORCH + "from engine.build import sources_digest; print(sources_digest())"
    settings: list[dict[str, Any]] = [{}, {setting: value}, {}]
    keys = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment("", **more), capture_output=True, text=True, check=True
        ).stdout
        for more in settings
    ]
    assert keys[0] == keys[2] != keys[1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


def flip_the_digest(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(bytes(data))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def another_format(file: Path) -> None:
    file.write_bytes(b"\x7fELF" + file.read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip, flip_the_digest, empty, another_format])
def test_a_damaged_object_is_built_again(damage: Callable[[Path], None], ready: Path) -> None:
    (file,) = objects(ready)
    whole = file.read_bytes()
    damage(file)
    assert double(ready) == ("built", True, [])
    assert file.read_bytes()[:16] == whole[:16]
    if damage is flip:
        assert double(ready) == ("loaded", False, [])


@pytest.mark.parametrize(("which", "mode"), [("folder", 0o770), ("folder", 0o707), ("version's folder", 0o777)])
def test_a_folder_that_others_can_write_is_refused(which: str, mode: int, ready: Path) -> None:
    (file,) = objects(ready)
    (ready if which == "folder" else file.parent).chmod(mode)
    before = file.stat().st_mtime_ns
    what, _, warned = double(ready)
    assert what == "built", "an object was loaded that others could have written"
    assert len(warned) == 1
    assert "can be written by others" in warned[0]
    assert "FASTNN_CACHE_DIR" in warned[0]
    assert file.stat().st_mtime_ns == before


@unix_root
@pytest.mark.parametrize("which", ["folder", "version's folder"])
def test_somebody_elses_folder_is_refused(which: str, ready: Path) -> None:
    (file,) = objects(ready)
    os.chown(ready if which == "folder" else file.parent, NOBODY, NOBODY)
    what, _, warned = double(ready)
    assert what == "built"
    assert "belongs to somebody else" in "".join(warned)


@unix_root
def test_somebody_elses_file_is_refused(ready: Path) -> None:
    (file,) = objects(ready)
    os.chown(file, NOBODY, NOBODY)
    assert double(ready)[0] == "built"
    assert file.stat().st_uid == os.geteuid()


def test_a_file_that_others_can_write_is_refused(ready: Path) -> None:
    (file,) = objects(ready)
    file.chmod(0o666)
    assert double(ready)[0] == "built"
    assert file.stat().st_mode & 0o022 == 0
    assert double(ready) == ("loaded", False, [])


def as_somebody(folder: Path) -> dict[str, Any]:
    """To be held to the modes of files, a process must not be root. The folder becomes its own."""
    if os.geteuid() != 0:
        return {}
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return {"BECOME": str(NOBODY)}


def test_a_read_only_cache_is_read(ready: Path) -> None:
    who = as_somebody(ready)
    for path in (*ready.rglob("*"), ready):
        path.chmod(0o500 if path.is_dir() else 0o400)
    what, _, warned = double(ready, **who)
    assert (what, warned) == ("loaded", [])


@pytest.mark.parametrize("filled", [False, True])
def test_where_nothing_can_be_written_kernels_are_built_in_memory(filled: bool, cache: Path) -> None:
    if filled:
        double(cache)
        objects(cache)[0].unlink()
    cache.mkdir(mode=0o700, exist_ok=True)
    who = as_somebody(cache)
    for path in (*cache.rglob("*"), cache):
        path.chmod(0o500)
    what, _, warned = double(cache, **who)
    assert what == "built"
    assert len(warned) == 1
    assert "Permission denied" in warned[0]
    assert objects(cache) == []


def test_a_path_that_cannot_be_a_folder(cache: Path) -> None:
    cache.write_text("a file")
    what, _, warned = double(cache)
    assert what == "built"
    assert len(warned) == 1
    assert str(cache) in warned[0]


@pytest.mark.parametrize("cache", ["~nosuchuser/x", "~/x"])
def test_a_home_that_is_nowhere(cache: str) -> None:
    """No such user; or no HOME and a user that the system does not know, as in a container. One warning, two kernels."""
    program = "import os, pwd\n"
    if cache == "~/x":
        program += "os.environ.pop('HOME', None)\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    values, what, _, *warned = fresh(program + DOUBLE.replace("print(run(", "run('test_other'), print(run("), cache)
    assert (values, what) == ("[2.0, 4.0, 6.0]", "built")
    assert len(warned) == 1
    assert f"the kernel cache {cache} cannot be used" in warned[0]


def test_a_disk_that_is_full_is_left_clean(tmp_path: Path) -> None:
    program = (
        NO_TORCH
        + f"""
import errno, warnings
from pathlib import Path
from engine.build import _write

def full(path, data):
    path.open("wb").write(data[:7])
    raise OSError(errno.ENOSPC, "No space left on device")

Path.write_bytes = full
with warnings.catch_warnings(record=True) as caught:
    _write(Path({str(tmp_path)!r}, "a.o"), b"code")
print(*(w.message for w in caught))
"""
    )
    (warned,) = fresh(program, tmp_path)
    assert "No space left on device" in warned
    assert list(tmp_path.iterdir()) == []


def test_an_empty_setting_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        assert double("") == ("built", True, [])
    assert list(tmp_path.rglob("*")) == []


def test_without_a_setting_the_users_cache_is_used(cache: Path) -> None:
    cases: list[tuple[dict[str, Any], Path]] = [
        ({"XDG_CACHE_HOME": str(cache / "xdg")}, cache / "xdg"),
        ({"XDG_CACHE_HOME": "", "HOME": str(cache)}, cache / ".cache"),
    ]
    for more, folder in cases:
        unset = {k: v for k, v in environment("", **more).items() if k != "FASTNN_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", NO_TORCH + "from engine.build import cache_dir; print(cache_dir())"],
            env=unset,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == str(folder / "fastnn"), done.stderr


def test_processes_that_fill_the_cache_at_once(cache: Path) -> None:
    together = f"import time; time.sleep(max(0, {time.time() + 2} - time.time()))\n"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", together + DOUBLE],
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.startswith("[2.0, 4.0, 6.0]\n")
        assert out.splitlines()[3:] == [], "no warnings"
    assert len(objects(cache)) == 1
    assert [p for p in cache.rglob("*") if p.is_file()] == objects(cache), "a temporary file was left"
    assert double(cache) == ("loaded", False, [])


def test_a_product_from_a_warm_cache_does_not_import_numba() -> None:
    code = """
import sys, torch
import fastnn.functional as F
x, w = torch.randn(70, 300), torch.randn(200, 300)
with torch.no_grad():
    for _ in range(3):
        y = F.linear(x, w, activation="gelu", backend="cpu")
F.mv(w, x[0], backend="cpu")
torch.testing.assert_close(y, torch.nn.functional.gelu(x @ w.t()), rtol=1e-4, atol=1e-4)
print("numba" in sys.modules)
"""
    for _ in range(2):  # the first fills the cache, if nothing else has yet
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
