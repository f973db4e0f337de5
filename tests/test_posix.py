"""What only POSIX has: signals, limits, permissions, terminals, links, and files that are no files."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.builds import ROOT
from support.command_line import cli, refusal
from support.hub import hub
from support.models import convert, digest

from gguf_firstlayer import FirstLayerError, auto
from gguf_firstlayer.c_api import processors
from gguf_firstlayer.isolation import isolated
from gguf_firstlayer.runtime import analyse

if os.name != "posix":
    pytest.skip("there is none of it", allow_module_level=True)

import fcntl
import pty
import resource
import termios


def test_what_cannot_be_mapped(llama, tmp_path):
    """Fails if the program waits for what never comes, or looks for its parent's streams in another process."""
    os.mkfifo(tmp_path / "fifo")
    for verb in ("plan", "convert", "inspect"):
        assert "fifo is not a regular file; save it to one first" in refusal(cli(verb, tmp_path / "fifo", timeout=60))
    if sys.platform == "linux":  # elsewhere, a stream does not tell its file
        with llama.open("rb") as file:
            assert cli("plan", "/dev/stdin", stdin=file).stdout == cli("plan", llama).stdout
    with (tmp_path / "x.gguf").open("wb") as file:  # as root, --force would replace the system's link
        done = cli("convert", llama, "-o", "/dev/stdout", "--force", stdout=file, stderr=subprocess.PIPE, capture_output=False)
    assert "/dev/stdout is not a regular file" in done.stderr


@pytest.mark.parametrize("megabytes", [0, 20])
def test_source_is_truncated(megabytes, smollm, tmp_path):
    """When it is mapped and read, which would end it by a signal, and when it is copied, where the system reports an error."""
    source = Path(shutil.copy(smollm, tmp_path / "x.gguf"))
    command = [sys.executable, "-m", "gguf_firstlayer", "convert", source, "--type", "q8_0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while written(tmp_path) < megabytes << 20:
            assert process.poll() is None, process.stderr.read()
        os.truncate(source, 10 << 20)
        _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert re.search("gguf-firstlayer: .*(it became shorter|was truncated while it was read)", errors.splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def read_what_is_gone(path: Path) -> int:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        file.truncate(0)
        return mapped[0]


def test_source_is_truncated_while_llama_cpp_reads_it(llama, tmp_path):
    """The child process in which it reads is ended by the signal. Fails if that is told as a crash of llama.cpp."""
    with pytest.raises(FirstLayerError, match=r"x\.gguf: a file could not be read to its end"):
        isolated(read_what_is_gone, Path(shutil.copy(llama, tmp_path / "x.gguf")))


ON_ONE_PROCESSOR = """
import os, sys
from pathlib import Path
from gguf_firstlayer.decoder import Decoder
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
with Decoder(Path(sys.argv[1]), 64) as run:
    list(run.decode(range(32)))
    print(threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for threads")
@pytest.mark.skipif(len(processors()) < 2, reason="needs two processors")
def test_processors_of_others_are_not_counted(llama):
    """Threads of ggml wait for each other busily. Fails if there are more than the processors that a container gives them."""
    done = subprocess.run([sys.executable, "-c", ON_ONE_PROCESSOR, llama], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def kill(_path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_child_process_is_killed(tmp_path):
    """Fails if that is told as a crash of llama.cpp."""
    with pytest.raises(FirstLayerError, match="perhaps for lack of memory"):
        isolated(kill, tmp_path)


def test_no_permission(llama, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(cli("convert", llama, "-o", tmp_path / "x.gguf"))


def test_disk_fills_up(llama, tmp_path):
    """A write fails half-way, because of a limit on the size of files."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    arguments = ["convert", llama, "-o", tmp_path / "x.gguf", "--type", "f32"]
    assert "cannot be written" in refusal(cli(*arguments, preexec_fn=limit))
    assert not list(tmp_path.iterdir())


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


def interrupt(command: list[str], sent: int, event: Callable[[subprocess.Popen], bool]) -> tuple[int, str]:
    """Send a signal to a command when an event has happened. Returns its exit code and errors."""

    def defaults() -> None:
        for number in SIGNALS[:3]:  # background jobs of a script ignore some
            signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=defaults
    ) as process:
        while not event(process):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(sent)
        _, errors = process.communicate()
    assert "Traceback" not in errors
    return process.returncode, errors


def written(folder: Path) -> int:
    """Bytes in the temporary folder of a conversion, -1 if there is none."""
    sizes = []
    with contextlib.suppress(FileNotFoundError):  # folders and files move while they are looked at
        for part in folder.glob(".*.part/*"):
            sizes.append(part.stat().st_size)
    return max(sizes, default=0 if list(folder.glob(".*.part")) else -1)


@pytest.mark.parametrize("sent", SIGNALS)
def test_interrupted(sent, smollm, smollm_flp, tmp_path):
    """At several points of a conversion: the source is intact, the output absent; the next conversion removes what is left."""
    before, whole = digest(smollm), digest(smollm_flp["q8_0"])
    output = tmp_path / "x.gguf"
    command = [sys.executable, "-m", "gguf_firstlayer", "convert", str(smollm), "-o", str(output), "--type", "q8_0"]
    for megabytes in (0, 20, 60, 100):
        code, errors = interrupt(command, sent, lambda _, size=megabytes << 20: written(tmp_path) >= size)
        assert not output.exists()
        if sent == signal.SIGKILL:
            assert code == -sent
            assert len(list(tmp_path.iterdir())) == 1
        else:
            assert code == 1
            assert errors.splitlines()[-1] == "gguf-firstlayer: interrupted, nothing was written"
            assert not list(tmp_path.iterdir())
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert list(tmp_path.iterdir()) == [output]
    assert digest(output) == whole
    assert digest(smollm) == before


def test_interrupted_when_all_is_written(llama, tmp_path):
    """Fails if that is called nothing."""
    code = """
import os, signal, sys
from gguf_firstlayer import __main__, output
sync = output._sync
output._sync = lambda path: os.kill(os.getpid(), signal.SIGTERM) if path.is_dir() else sync(path)
sys.exit(__main__.main(["convert", *sys.argv[1:]]))
"""
    command = [sys.executable, "-c", code, llama, "-o", tmp_path / "x.gguf", "--type", "q8_0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"gguf-firstlayer: interrupted, {tmp_path / 'x.gguf'} is complete"
    assert (tmp_path / "x.gguf").read_bytes() == convert(llama, tmp_path / "y.gguf", type="q8_0").output.read_bytes()


def test_killed_between_parts(llama, tmp_path):
    """Fails if parts of the old output and of the new one are left as one model."""
    code = """
import os, signal, sys
from gguf_firstlayer import __main__, output
appear, done = output._appear, []
def killed(*arguments):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(appear(*arguments))
output._appear = killed
sys.exit(__main__.main(["convert", *sys.argv[1:]]))
"""
    options = ["-o", tmp_path / "x.gguf", "--type", "f32", "--split-max-size", "1M"]
    assert cli("convert", llama, *options).returncode == 0
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in whole:
        path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, llama, *options, "--force"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len([path for path in tmp_path.glob("x-*") if path.read_bytes() == whole[path]]) == 1
    assert not (tmp_path / min(whole)).exists()
    assert cli("convert", llama, *options, "--force").returncode == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_interrupted_when_the_folder_is_made(llama, tmp_path):
    """Fails if the folder stays."""
    code = """
import os, signal, sys, tempfile
from gguf_firstlayer import __main__
make = tempfile.mkdtemp
def interrupted(dir=None, **options):
    made = make(dir=dir, **options)
    if str(dir) == sys.argv[-1]:
        os.kill(os.getpid(), signal.SIGTERM)
    return made
tempfile.mkdtemp = interrupted
sys.exit(__main__.main(["convert", sys.argv[1], "-o", f"{sys.argv[-1]}/x.gguf"]))
"""
    done = subprocess.run([sys.executable, "-c", code, llama, tmp_path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "gguf-firstlayer: interrupted, nothing was written"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what is mapped")
def test_interrupted_while_it_starts(smollm):
    """While numpy is being imported: no traceback."""

    def importing(process: subprocess.Popen) -> bool:
        try:
            return "numpy" in Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            return False

    code, _ = interrupt([sys.executable, "-m", "gguf_firstlayer", "plan", str(smollm)], signal.SIGINT, importing)
    assert code in (-signal.SIGINT, 1)


def test_interrupted_while_measuring(smollm, tmp_path):
    """In the middle of a call into llama.cpp."""
    command = [sys.executable, "-m", "gguf_firstlayer", "convert", str(smollm), "-o", str(tmp_path / "x.gguf")]

    def measuring(process: subprocess.Popen) -> bool:
        return any(line.startswith("measuring") for line in process.stderr)

    assert interrupt(command, signal.SIGINT, measuring) == (1, "gguf-firstlayer: interrupted, nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_an_interruption_is_not_called_a_crash(llama):
    """Its child process has ended by then. Fails if closing what that held says so."""

    def measure():
        with analyse(llama) as analysis, auto.Effects(llama, analysis):
            analysis.process._end()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_interrupted_plan(sent, smollm, tmp_path):
    """Of a part of a file, which is read from a sparse copy in a child process. Fails if that copy stays."""
    part, folder = tmp_path / "part.gguf", tmp_path / "tmp"
    part.write_bytes(smollm.read_bytes()[: 8 << 20])
    folder.mkdir()
    command = ["env", f"TMPDIR={folder}", sys.executable, "-m", "gguf_firstlayer", "plan", str(part)]
    code, _ = interrupt(command, sent, lambda _: any(folder.glob("*/part.gguf")))
    assert code == 1
    assert not list(folder.iterdir())


def test_only_conversions_say_that_nothing_was_written(smollm, smollm_flp):
    command = [sys.executable, "-m", "gguf_firstlayer", "bench", str(smollm), str(smollm_flp["q8_0"])]
    loading = interrupt(command, signal.SIGINT, lambda process: process.stderr.readline().startswith("loading"))
    assert loading == (1, "gguf-firstlayer: interrupted\n")


def test_nohup_is_obeyed(llama, tmp_path):
    """If SIGHUP is ignored, the conversion must go on after the terminal is closed."""
    command = ["nohup", sys.executable, "-m", "gguf_firstlayer", "convert", str(llama), "-o", str(tmp_path / "x.gguf")]
    with subprocess.Popen([*command, "--type", "f32"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while written(tmp_path) < 0 and process.poll() is None:
            pass
        process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("verb", ["convert", "revert", "bench"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "socket"])
def test_output_is_no_file(verb, kind, llama, llama_flp, tmp_path):
    """Not even with --force: it would be replaced by a file."""
    name = "llama-flp-bench.png" if verb == "bench" else "x.gguf"
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("root may make devices")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    arguments = {
        "convert": ("convert", llama, "-o", path, "--force"),
        "revert": ("revert", llama_flp, "--source", llama, "-o", path, "--force"),
        "bench": ("bench", llama, llama_flp, "--plot", tmp_path),
    }
    message = refusal(cli(*arguments[verb]))
    option = "--plot" if verb == "bench" else "-o"
    assert message == f"gguf-firstlayer: {path} is not a regular file; choose another name with {option}"
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_output_is_a_link_to_the_source(llama, tmp_path):
    source, link = tmp_path / "x.gguf", tmp_path / "link.gguf"
    shutil.copy(llama, source)
    link.symlink_to(source)
    before = digest(source)
    assert "is an input" in refusal(cli("convert", source, "-o", link, "--force"))
    assert digest(source) == before


def test_output_is_a_link_that_leads_nowhere(llama, tmp_path):
    path = tmp_path / "x.gguf"
    path.symlink_to(tmp_path / "gone.gguf")
    assert "exists" in refusal(cli("convert", llama, "-o", path))
    assert cli("convert", llama, "-o", path, "--type", "f32", "--force").returncode == 0
    assert not path.is_symlink()


def at_a_terminal(*words: object, columns: int) -> str:
    """What a verb writes to a terminal of this width."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "gguf_firstlayer", *map(str, words)]
    subprocess.run(command, cwd=ROOT, stderr=secondary, stdout=secondary, check=True)
    os.close(secondary)
    seen = b""
    with contextlib.suppress(OSError):  # at the end
        while chunk := os.read(primary, 10000):
            seen += chunk
    os.close(primary)
    return seen.decode()


def test_a_table_at_a_narrow_terminal(llama, smollm):
    """Fails if names or figures are cut off."""
    seen = at_a_terminal("plan", llama, smollm, "--device", "h100", columns=40)
    for name in (llama, smollm):
        (line,) = (line for line in seen.splitlines() if name.name in line)
        assert len(re.findall(r"\d\.\d{4}x", line)) == 8
    assert "…" not in seen


@pytest.mark.parametrize("source", ["hf:user/x", "URL"])
def test_a_download_at_a_terminal(source, smollm, tmp_path, monkeypatch):
    """Fails if a download of gigabytes is silent."""
    with hub({"smollm-Q4_1.gguf": smollm}) as server:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        name = source.replace("URL", f"{server.elsewhere}smollm-Q4_1.gguf")
        seen = at_a_terminal("inspect", name, columns=100)
    assert re.search(r"smollm-Q4_1.gguf: 100%\|.*\| 98.4M/98.4M \[", seen)
    assert "not converted" in seen


def test_bars_at_a_terminal(llama, tmp_path):
    seen = at_a_terminal("convert", llama, "-o", tmp_path / "y.gguf", columns=100)
    # as many runs as were announced, with a time left
    bars = re.findall(r"measuring on \d+ tokens: +(\d+)%\|.*?\| (\d+)/(\d+) \[[\d:]+<([\d:?]+)", seen)
    assert bars[0][1] == "0"
    assert bars[-1][:2] == ("100", bars[-1][2])
    assert "tables: 100%" in seen
