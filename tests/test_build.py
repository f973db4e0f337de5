"""The CMake build is configured here; scripts/test builds it patched and unpatched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support.builds import PATCHED, ROOT, STOCK
from support.command_line import refusal

from gguf_firstlayer.installation import library_name

PATCH = ROOT / "patches" / "hooks.patch"
PATCHED_FILES = re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(), re.MULTILINE)


def configure(source, build, *options):
    command = ["cmake", "-S", source, "-B", build, *options]
    environment = os.environ | {"LD_PRELOAD": ""}  # CMake hangs under ThreadSanitizer
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_hooks_stay_small():
    added = [line for line in PATCH.read_text().splitlines() if re.match(r"\+[^+]", line)]
    assert len(PATCHED_FILES) <= 11
    assert len(added) <= 60


def test_stock_is_unpatched():
    symbols = b"llama_firstlayer_init"
    assert symbols not in (STOCK / library_name("llama")).read_bytes()
    assert symbols in (PATCHED / library_name("llama")).read_bytes()


def test_checkout_is_used_and_not_modified(tmp_path):
    """-DLLAMA_CPP_SOURCE_DIR, with patches that apply, also that of the web UI."""
    checkout = ROOT / "build" / "stock" / "llama.cpp"
    before = {name: (checkout / name).stat().st_mtime_ns for name in PATCHED_FILES}
    done = configure(ROOT, tmp_path, f"-DLLAMA_CPP_SOURCE_DIR={checkout}", "-DLLAMA_BUILD_UI=ON")
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(checkout) in done.stdout
    assert {name: (checkout / name).stat().st_mtime_ns for name in PATCHED_FILES} == before
    assert not (checkout / "src" / "llama-firstlayer.h").exists()
    assert (tmp_path / "llama.cpp" / "src" / "llama-firstlayer.h").exists()
    assert "LLAMA_UI_VERSION" in (tmp_path / "llama.cpp" / "tools" / "ui" / "svelte.config.js").read_text().split("version:")[1]
    assert all(
        "firstlayer" in (tmp_path / "llama.cpp" / name).read_text() for name in PATCHED_FILES if name.endswith("model.h")
    )


def test_second_configure_touches_nothing(tmp_path):
    assert configure(ROOT, tmp_path).returncode == 0
    sources = [path for path in (tmp_path / "llama.cpp" / "src").iterdir() if path.is_file()]
    sources += [tmp_path / "llama.cpp" / name for name in PATCHED_FILES]
    before = {path: path.stat().st_mtime_ns for path in sources}
    assert configure(ROOT, tmp_path).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in sources} == before


def test_bill_of_materials():
    """Names llama.cpp's commit, and all that it vendors with the right hashes. Fails if something vendored is left out."""
    (llama,) = json.loads((ROOT / "build" / "sbom.cdx.json").read_text())["components"]
    assert llama["version"] == json.loads((PATCHED / "build.json").read_text())["llama.cpp"]
    folder = ROOT / "build" / "llama.cpp"
    listed = {file["name"]: file["hashes"][0]["content"] for library in llama["components"] for file in library["components"]}
    sources = [path for path in (folder / "vendor").rglob("*") if path.suffix in (".h", ".hpp", ".c", ".cpp")]
    assert len(sources) > 8
    expected = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    assert listed == expected


@pytest.mark.parametrize("broken", ["already patched", "unknown file"])
def test_patch_that_does_not_apply(broken, tmp_path):
    """Configuring stops, and names the patch and the required llama.cpp version."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "CMakeLists.txt", project)
    shutil.copytree(ROOT / "cmake", project / "cmake")
    shutil.copytree(ROOT / "patches", project / "patches")
    options = [f"-DLLAMA_CPP_SOURCE_DIR={ROOT / 'build' / 'llama.cpp'}"]
    if broken == "unknown file":
        patch = project / "patches" / "hooks.patch"
        patch.write_text(patch.read_text().replace("llama-arch.h", "llama-ark.h"))
    done = configure(project, tmp_path / "build", *options)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert ("backends.patch" if broken == "already patched" else "llama-ark.h") in message
    assert re.search(r"LLAMA_CPP_PYTHON_VERSION +(\S+)\)", (ROOT / "cmake" / "llama-cpp.cmake").read_text())[1] in message


def test_libraries_of_others(llama, tmp_path):
    """Fails if such libraries are called as if they were ours."""
    (tmp_path / "bin").symlink_to(STOCK)
    code = "import sys, pathlib; from gguf_firstlayer import __main__, installation; "
    code += "installation.PACKAGE = pathlib.Path(sys.argv[2]); sys.exit(__main__.main(['plan', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, llama, tmp_path], capture_output=True, text=True, check=False)
    assert re.search(r"bin/libllama\.\w+ lacks this package's patches, or has others; build again$", refusal(done))


@pytest.mark.parametrize("project", sorted((ROOT / "plugins").glob("*/pyproject.toml")), ids=lambda path: path.parent.name)
def test_plugins_fit_the_package(project):
    """A backend fits the libraries that it was built with. Fails if only the package's version was raised."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert set(re.findall(r'(?:^version = "|gguf-firstlayer==)([^"]+)', project.read_text(), re.MULTILINE)) == {version}
