"""Hostile programs, and what stops each of them.

A program that got what it wanted says so: it raises HARM. Names after a dollar
sign are what it aims at; `aim` puts them in.
"""

from collections.abc import Sequence
import dataclasses
import os
import string
import textwrap

HARM = "HARM"


@dataclasses.dataclass(frozen=True)
class Attack:
  """One hostile program.

  Attributes:
    name: unique.
    kind: what it is after.
    source: the program, `string.Template` text.
    stopped_by: what stops it in the full sandbox: "filter", "names", "trace"
      (of abstract values), "verifier", "screener", "wall clock", "pipe cap",
      "zygote", a layer of `layers`; "nothing" where it is harmless by design.
    alone: each of these stops it when it has all of Python, without filter and
      restricted names; where there is none, it may be admitted, for no harm.
    control: it may be run without a kernel layer: it harms what it aims at
      alone, and says so.
  """

  name: str
  kind: str
  source: str
  stopped_by: str
  alone: tuple[str, ...]
  control: bool = False


def aim(attack: Attack, targets: dict[str, object]) -> str:
  """The program, aimed."""
  return string.Template(attack.source).substitute(targets)


def _merge(body, head=""):
  body = textwrap.indent(textwrap.dedent(body).strip(), "  ")
  head = textwrap.dedent(head).strip()
  return f"{head}\n\ndef merge(base, task_vectors):\n{body}\n"


# --- Against the kernel's layers ---------------------------------------------

_IMPORTS = """
import ctypes, json, mmap, os, pickle, resource, shutil, signal, socket
import struct, subprocess, sys, threading, time
import jax, jax.numpy as jnp, numpy as np

libc = ctypes.CDLL(None, use_errno=True)

def ask(name, *arguments):
  # A number is a system call; refused is not the same as bad arguments.
  call = getattr(libc, name) if isinstance(name, str) else libc.syscall
  if not isinstance(name, str): arguments = (name, *arguments)
  call.restype = ctypes.c_long
  result = call(*arguments)
  failed = ctypes.c_int(result).value == -1
  if failed and ctypes.get_errno() in (1, 2, 13, 38):
    raise OSError(ctypes.get_errno(), "refused")
  return result
"""
# Those whose numbers are not everyone's: x86-64, AArch64.
_NUMBERS = {
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "process_vm_readv": (310, 270),
}


def _number(name):
  return _NUMBERS[name][os.uname().machine == "aarch64"]


_PATHS = ("chroot", "uid", "landlock", "seccomp")  # A file that is root's.
_PUBLIC = ("chroot", "landlock", "seccomp")  # A file that all may read.
_META = ("chroot", "uid", "seccomp")  # Landlock has no right for these.
_NETWORK = ("seccomp", "namespaces")
_ROOT = ("chroot", "uid", "seccomp")  # A capability is needed.
_OTHERS = ("uid", "landlock", "seccomp")  # Other processes.
_TRACED = ("chroot", *_OTHERS)  # Those with more capabilities.
_ECHO = """echo '{"rejected": ["trace", "x", "HARM"]}' >&3"""

_READ = """
text = {}
if isinstance(text, bytes): text = text.decode(errors="replace")
if not text: raise OSError("empty")
"""

# Name, what it does, what stops it alone.
_FILES = (
    ("read_public", _READ.format("open('$public').read()"), _PUBLIC),
    ("read_private", _READ.format("open('$private').read()"), _PATHS),
    ("read_passwd", _READ.format("open('/etc/passwd').read()"), _PUBLIC),
    (
        "read_by_libc",
        """
        fd = ask("open", b"$public", 0)
        buffer = ctypes.create_string_buffer(64)
        ask("read", ctypes.c_int(fd), buffer, 64)
        """,
        _PUBLIC,
    ),
    (
        "read_by_openat2",
        "ask(437, -100, b'$public', struct.pack('<3Q', 0, 0, 0), 24)",
        _PUBLIC,
    ),
    (
        "read_through_parents",
        _READ.format("open('../' * 40 + '$private').read()"),
        _PATHS,
    ),
    (
        "read_after_chdir",
        "os.chdir('$victim')\n" + _READ.format("open('file').read()"),
        _PUBLIC,
    ),
    (
        "read_through_symlink",
        """
        os.symlink("$private", "link")
        try: text = open("link").read()
        finally: os.unlink("link")
        """,
        _PATHS,
    ),
    ("numpy_fromfile", "np.fromfile('$public', np.uint8)", _PUBLIC),
    ("numpy_memmap", "np.memmap('$public', np.uint8, 'r')", _PUBLIC),
    ("numpy_loadtxt", "np.loadtxt('$public', dtype=str)", _PUBLIC),
    ("jnp_load", "jnp.load('$victim/array.npy')", _PUBLIC),
    (
        "jnp_save",
        "jnp.save('$victim/new.npy', np.zeros(0))",
        ("rlimits", *_PATHS),
    ),
    ("array_tofile", "np.zeros(1).tofile('$victim/new')", _PATHS),
    ("load_library", "ctypes.CDLL('libutil.so.1')", _PUBLIC),
    ("list_directory", "os.listdir('$victim')", _PUBLIC),
    ("stat_oracle", "os.stat('$public')", ("chroot", "seccomp")),
    ("readlink_oracle", "os.readlink('$victim/link')", ("chroot", "seccomp")),
    ("truncate_by_open", "open('$victim/file', 'w')", _PATHS),
    (
        "append",
        "with open('$victim/file', 'ab') as file: file.write(b'x')",
        ("rlimits", *_PATHS),
    ),
    ("create", "open('$victim/new', 'w')", _PATHS),
    ("truncate", "os.truncate('$victim/file', 0)", _PATHS),
    ("unlink", "os.unlink('$victim/file')", _PATHS),
    ("rmtree", "shutil.rmtree('$victim/directory')", _PATHS),
    ("rmdir", "os.rmdir('$victim/directory')", _PATHS),
    ("mkdir", "os.mkdir('$victim/new')", _PATHS),
    ("rename", "os.rename('$victim/file', '$victim/new')", _PATHS),
    ("symlink", "os.symlink('file', '$victim/new')", _PATHS),
    ("hardlink", "os.link('$victim/file', '$victim/new')", _PATHS),
    ("mkfifo", "os.mkfifo('$victim/new')", _PATHS),
    ("mknod", "os.mknod('$victim/new', 0o60600, os.makedev(1, 1))", _PATHS),
    ("chmod", "os.chmod('$victim/file', 0o777)", _META),
    ("chown", "os.chown('$victim/file', 1, 1)", _META),
    ("utime", "os.utime('$victim/file', (1, 1))", _META),
    ("setxattr", "os.setxattr('$victim/file', 'trusted.a', b'b')", _META),
    (
        "leave_a_file_in_scratch",
        "open('left', 'w').close()\nos.unlink('left')",
        ("uid", "landlock", "seccomp"),
    ),
    (
        "temporary_file",
        """
        path = "/tmp/selfdev_attack_%d" % os.getpid()
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.unlink(path)
        """,
        _PUBLIC,
    ),
    (
        "pickle_that_opens",
        """
        class Payload:
          def __reduce__(self): return open, ("$victim/new", "w")
        pickle.loads(pickle.dumps(Payload()))
        """,
        _PATHS,
    ),
    (
        "inotify",
        "ask('inotify_add_watch', ask('inotify_init'), b'$victim', 2)",
        ("chroot", "seccomp"),
    ),
    (
        "shm_open",
        """
        ask("shm_open", b"/selfdev_attack", os.O_CREAT | os.O_RDWR, 0o600)
        libc.shm_unlink(b"/selfdev_attack")
        """,
        _PUBLIC,
    ),
    (
        "leave_the_chroot",
        """
        os.mkdir("down")
        try:
          os.chroot("down")
          os.chdir("../" * 40)
          os.chroot(".")
          text = open("$private").read()
        finally:
          os.rmdir("$scratch/down")
        """,
        _PATHS,
    ),
    (
        "mount",
        """
        os.mkdir("over")
        try:
          ask("mount", b"none", b"over", b"tmpfs", 0, None)
          libc.umount2(b"over", 2)
        finally:
          os.rmdir("over")
        """,
        _PATHS,
    ),
    ("environ_of_caller", "open('/proc/$caller/environ').read(9)", _PATHS),
    ("arguments_of_caller", "open('/proc/$caller/cmdline').read()", _PUBLIC),
    ("root_of_caller", "open('/proc/$caller/root$private').read()", _PATHS),
    (
        "memory_of_zygote",
        "open('/proc/%d/mem' % os.getppid(), 'r+b')",
        _PATHS,
    ),
    (
        "answer_of_zygote",
        "open('/proc/%d/fd/1' % os.getppid(), 'wb')",
        _PATHS,
    ),
    ("own_memory", "open('/proc/self/mem', 'r+b')", _PATHS),
    ("own_maps", "open('/proc/self/maps').read()", _PUBLIC),
)
_PROCESSES = (
    (
        "fork",
        "if os.fork() == 0: os._exit(0)",
        ("seccomp",),
    ),
    (
        "vfork_exec",
        "subprocess.run(['/bin/true'], check=True)",
        _PUBLIC,
    ),
    (
        "posix_spawn",
        """
        pid = os.posix_spawn("/bin/true", ["true"], {})
        if os.waitpid(pid, 0)[1]: raise OSError
        """,
        _PUBLIC,
    ),
    ("os_system", "if os.system('exit 0'): raise OSError", _PUBLIC),
    (
        "pickle_that_runs",
        """
        class Payload:
          def __reduce__(self): return os.system, ("exit 0",)
        if pickle.loads(pickle.dumps(Payload())): raise OSError
        """,
        _PUBLIC,
    ),
    (
        "exec_shell",
        f"os.execv('/bin/sh', ['sh', '-c', {_ECHO!r}])",
        _PUBLIC,
    ),
    ("memfd", "os.write(os.memfd_create('x'), b'x')", ("rlimits", "seccomp")),
    (
        "executable_memory",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC | mmap.PROT_WRITE)",
        ("seccomp",),
    ),
    (
        "memory_made_executable",
        """
        page = mmap.mmap(-1, 4096)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        ask("mprotect", ctypes.c_void_p(address), 4096, 7)
        """,
        ("seccomp",),
    ),
    (
        "thread",
        """
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        """,
        ("seccomp",),
    ),
    ("signal_zygote", "os.kill(os.getppid(), 0)", _OTHERS),
    ("signal_group", "os.killpg(os.getpgid(os.getppid()), 0)", _OTHERS),
    ("signal_caller", "os.kill($caller, 0)", _OTHERS),
    (
        "signal_by_pidfd",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        _OTHERS,
    ),
    ("ptrace_zygote", "ask('ptrace', 0x4206, os.getppid(), 0, 0)", _TRACED),
    (
        "read_zygote",
        f"""
        buffer = ctypes.create_string_buffer(8)
        vector = struct.pack("<QQ", ctypes.addressof(buffer), 8)
        parent = os.getppid()
        ask({_number("process_vm_readv")}, parent, vector, 1, vector, 1, 0)
        """,
        _TRACED,
    ),
    (
        "descriptor_of_zygote",
        "ask(438, os.pidfd_open(os.getppid()), 1, 0)",
        _TRACED,
    ),
    ("prctl_outlive_parent", "ask('prctl', 1, 0, 0, 0, 0)", ("seccomp",)),
    ("become_root", "os.setresuid(0, 0, 0)", ("uid", "seccomp")),
    ("become_someone", "os.setresuid(1, 1, 1)", ("uid", "seccomp")),
    (
        "limit_zygote",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
        ("uid", "seccomp"),
    ),
    ("user_namespace", "ask('unshare', 0x10000000)", ("chroot", "seccomp")),
    (
        "join_namespaces",
        "ask('setns', os.open('/proc/$caller/ns/net', 0), 0)",
        _PATHS,
    ),
    (
        "real_time",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        _ROOT,
    ),
    ("priority_of_zygote", "os.setpriority(0, os.getppid(), 0)", _META),
    ("new_keyring", f"ask({_number('keyctl')}, 1, None)", ("seccomp",)),
    ("bpf", f"ask({_number('bpf')}, 0, None, 0)", ("seccomp",)),
    ("userfaultfd", f"ask({_number('userfaultfd')}, 1)", ("seccomp",)),
    ("io_uring", "ask(425, 1, bytes(120))", ("seccomp",)),
    ("fanotify", f"ask({_number('fanotify_init')}, 0, 0)", _ROOT),
    ("set_clock", "ask('clock_settime', 99, bytes(16))", ("seccomp",)),
)
_CONNECTIONS = (
    (
        "tcp",
        "socket.socket().connect(('127.0.0.1', $tcp))",
        ("landlock", *_NETWORK),
    ),
    (
        "tcp_listen",
        "s = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()",
        ("landlock", "seccomp"),
    ),
    (
        "tcp_fast_open",
        """
        s = socket.socket()
        s.sendto(b"x", 0x20000000, ("127.0.0.1", $tcp))
        """,
        _NETWORK,
    ),
    (
        "mptcp",
        "s = socket.socket(2, 1, 262)\ns.connect(('127.0.0.1', $tcp))",
        _NETWORK,
    ),
    (
        "udp",
        "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', $udp))",
        _NETWORK,
    ),
    (
        "abstract_socket",
        "socket.socket(1).connect('\\0$abstract')",
        ("landlock", *_NETWORK),
    ),
    (
        "socket_by_path",
        "socket.socket(1).connect('$victim/socket')",
        _META,
    ),
    ("netlink", "socket.socket(16, 3, 0).bind((0, 0))", ("seccomp",)),
    ("raw_socket", "socket.socket(2, 3, 1)", _ROOT),
    ("packet_socket", "socket.socket(17, 3, 0)", _ROOT),
    ("vsock", "socket.socket(40, 1)", ("seccomp",)),
    (
        "send_descriptor",
        """
        a, b = socket.socketpair()
        socket.send_fds(a, [b"x"], [1])
        """,
        ("seccomp",),
    ),
    (
        "shared_memory_of_caller",
        """
        number = ask("shmget", $segment, 0, 0)
        address = ask("shmat", number, None, 0o10000)
        text = ctypes.string_at(address, 9)
        """,
        _NETWORK,
    ),
    ("message_queue", "ask('msgget', 0, 0o1600)", ("seccomp",)),
)
_MEMORY = (
    (
        "map_memory",
        "mmap.mmap(-1, 1 << 30)",
        ("rlimits",),
    ),
    ("descriptors", "for _ in range(100): os.dup(1)", ("rlimits", "seccomp")),
)


def _kernel(kind, rows):
  for name, body, alone in rows:
    body = textwrap.dedent(body).strip() + f"\nraise ValueError('{HARM}')"
    if "text = " in body:
      body = body.replace(f"'{HARM}'", f"'{HARM} %s' % text")
    source = _merge(body, _IMPORTS)
    yield Attack(name, kind, source, "filter", alone, control=True)


# --- Against the restricted language -----------------------------------------

# Name, program, what stops it in the full sandbox. All but the last few are
# ways to `os.system`: with all of Python they end at the kernel's layers.
_SEARCH = """
for found in {}.__subclasses__():
  if found.__name__ == "_wrap_close":
    if found.__init__.__globals__["system"]("exit 0"):
      raise ValueError("refused")
    raise ValueError("HARM")
"""
_LANGUAGE = (
    ("mro_walk", _SEARCH.format("().__class__.__mro__[1]"), "filter"),
    ("mro_method", _SEARCH.format("int.mro()[1]"), "filter"),
    (
        "fullwidth_letters",
        "x = ().__\uff43lass__\nreturn base",
        "filter",
    ),
    ("f_string", "return base + len(f'{().__class__}')", "filter"),
    ("walrus", "return base + len([c := ().__class__])", "filter"),
    (
        "lambda_default",
        "return (lambda x, c=().__class__: x)(base)",
        "filter",
    ),
    (
        "generator_frame",
        "g = (x for x in [1])\nreturn base * len(g.gi_frame.f_back.f_globals)",
        "filter",
    ),
    (
        "traceback_frame",
        """
        try: 1 / 0
        except ArithmeticError as error: e = error
        return base * len(e.__traceback__.tb_frame.f_builtins)
        """,
        "filter",
    ),
    (
        "exception_context",
        """
        try:
          try: 1 / 0
          except ArithmeticError: [][0]
        except IndexError as error: c = error.__context__
        return base
        """,
        "filter",
    ),
    (
        "closure_cell",
        "f = lambda: base\nreturn f.__closure__[0].cell_contents",
        "filter",
    ),
    ("globals_of_function", "return merge.__globals__['base']", "filter"),
    ("wrapped_function", "return jnp.sum.__wrapped__(base)", "filter"),
    ("getattr", "return getattr(jnp, 'load')('x')", "filter"),
    ("hidden_names", "x = vars()\ny = globals()\nreturn base", "filter"),
    ("builtins_import", "__import__('builtins').open('x')", "filter"),
    ("builtins_name", "__builtins__['open']('x')", "filter"),
    ("type_with_three_arguments", "type('X', (), {})\nreturn base", "filter"),
    ("eval", "return eval('base')", "filter"),
    ("exec", "exec('import os')\nreturn base", "filter"),
    (
        "decorator",
        "@exec\n@compile\ndef f(): 'import os'\nreturn base",
        "filter",
    ),
    ("class", "class X: pass\nreturn base", "filter"),
    ("generator", "def f(): yield 1\nreturn base", "filter"),
    ("async", "async def f(): pass\nreturn base", "filter"),
    ("assign_attribute", "jnp.sum = None\nreturn base", "filter"),
    ("assign_by_loop", "for jnp.sum in [1]: pass\nreturn base", "filter"),
    ("delete_attribute", "del jnp.sum\nreturn base", "filter"),
    ("import_os", "import os\nreturn base", "filter"),
    ("import_second", "import math, os\nreturn base", "filter"),
    ("import_star", "from jax import *\nreturn base", "filter"),
    ("import_relative", "from . import zygote\nreturn base", "filter"),
    ("import_private", "import jax._src\nreturn base", "filter"),
    ("import_config", "from jax import config\nreturn base", "filter"),
    (
        "import_importlib",
        "import importlib\nimportlib.import_module('os')\nreturn base",
        "filter",
    ),
    ("facade_load", "jnp.load('$public')\nreturn base", "filter"),
    ("facade_frompyfunc", "jnp.frompyfunc(print, 1, 1)\nreturn base", "filter"),
    (
        "config_update",
        "jax.config.update('jax_enable_x64', True)\nreturn base",
        "filter",
    ),
    (
        "debug_callback",
        "jax.debug.callback(print, base)\nreturn base",
        "filter",
    ),
    (
        "pure_callback",
        "return jax.pure_callback(lambda x: x, base, base)",
        "filter",
    ),
    (
        "io_callback",
        "from jax.experimental import io_callback\n"
        "return io_callback(lambda x: x, base, base)",
        "filter",
    ),
    (
        "ffi_call",
        "return jax.ffi.ffi_call('lapack_sgetrf_ffi', base)(base)",
        "filter",
    ),
    ("profiler", "jax.profiler.start_server(9)\nreturn base", "filter"),
    (
        "distributed",
        "jax.distributed.initialize('127.0.0.1:1', 1, 0)\nreturn base",
        "filter",
    ),
    (
        "export",
        "return jax.export.deserialize(b'x').call(base)",
        "filter",
    ),
    ("infeed", "return jax.lax.infeed(base)", "filter"),
    ("host_memory", "return jax.device_put(base)", "filter"),
    # The filter sees no attribute in these.
    (
        "format_string",
        "raise ValueError('{0.__wrapped__.__globals__}'.format(jnp.sum)[:200])",
        "trace",
    ),
    (
        "format_environment",
        "for f in (jnp.sum, math.sin, jnp.vectorize, merge):\n"
        "  try:\n"
        "    text = '{0.__globals__[os].environ}'.format(f)\n"
        "  except Exception: continue\n"
        "  raise ValueError(text)\n"
        "return None",
        "trace",
    ),
    ("undefined_name", "return open_file(base)", "names"),
    ("method_of_tracer", "return base.to_bytes()", "names"),
    (
        "match_statement",
        """
        o = int.mro()[1]
        match o:
          case o(__subclasses__=subclasses): pass
        for found in subclasses():
          match found:
            case o(__name__="_wrap_close", __init__=init):
              match init:
                case o(__globals__=g): pass
              if g["system"]("exit 0") == 0: raise ValueError("HARM")
              raise ValueError("refused")
        """,
        "filter",
    ),
    (
        "match_statement_reads",
        """
        o = int.mro()[1]
        match o:
          case o(__subclasses__=subclasses): pass
        for found in subclasses():
          match found:
            case o(__name__="_wrap_close", __init__=init):
              match init:
                case o(__globals__=g): pass
              match g["sys"]:
                case o(modules=modules): pass
              match modules["builtins"]:
                case o(open=read): pass
              raise ValueError("HARM " + read("$public").read())
        """,
        "filter",
    ),
    (
        "compile_in_the_child",
        "f = jax.jit(lambda x: x).lower(1.0).compile()\n"
        "raise ValueError('HARM %s' % f(1.0))",
        "seccomp",
    ),
)


def _language():
  for name, body, stopped_by in _LANGUAGE:
    yield Attack(name, "introspection", _merge(body), stopped_by, ())


# --- Time and memory, in plain Python ----------------------------------------

_ENDLESS = (
    ("endless_loop", "while base.ndim: pass"),
    ("power", "return base + 9 ** 9 ** 9"),
    ("factorial", "return base + math.factorial(10**8)"),
    ("endless_sum", "return base + sum(range(10**12))"),
    (
        "endless_iterator",
        "return base + sum(1 for _ in itertools.product(range(99), repeat=9))",
    ),
    ("loop_that_catches", "while base.ndim:\n  try: 1 / 0\n  except: pass"),
)
_ENDLESS_WITH_IMPORTS = (
    ("sleep", "time.sleep(100)"),
    (
        "stop_itself",
        """
        try: os.kill(os.getpid(), signal.SIGSTOP)
        except OSError: time.sleep(100)
        """,
    ),
    (
        "ignore_signals",
        """
        for number in range(1, 65):
          try: signal.signal(number, signal.SIG_IGN)
          except (OSError, ValueError): pass
        while True: pass
        """,
    ),
    ("catastrophic_regex", "import re\nre.match('(a+)+b', 'a' * 50)"),
    ("output_for_ever", "while True: os.write(1, b'x' * 99_999)"),
    ("slow_answer", "while True: os.write(3, b'x'); time.sleep(0.1)"),
)
_HUGE = (
    ("long_string", "return base + len('x' * 10**12)", "rlimits"),
    ("padded_string", "return base + len(f'{1:>9999999999}')", "rlimits"),
    ("long_list", "return base + len([0] * 10**10)", "rlimits"),
    ("growing_list", "x = [0]\nwhile len(x): x += x", "rlimits"),
    ("recursion", "return merge(base, task_vectors)", "trace"),
    (
        "nested_jit",
        "f = jnp.sin\nfor _ in range(30): f = jax.jit(lambda x, f=f: f(f(x)))\n"
        "return f(base)",
        "trace",
    ),
    (
        "unrolled_loop",
        "for _ in range(6_000): base = base + 1.0\nreturn base",
        "trace",
    ),
    (
        "too_many_paths",
        "for t in task_vectors * 9:\n"
        "  for i in range(4):\n"
        "    if t.ravel()[i] > i: base = base + t\n"
        "return base",
        "trace",
    ),
    (
        "while_on_data",
        "return lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, base)",
        "trace",
    ),
    (
        "huge_constant",
        "return base + jnp.array([0.5] * 70_000).sum()",
        "verifier",
    ),
    (
        "huge_loop",
        "return lax.fori_loop(0, 10**9, lambda i, x: x + 1.0, base)",
        "verifier",
    ),
    (
        "nested_loops",
        "f = lambda g: lambda i, x: lax.fori_loop(0, 999, g, x)\n"
        "return f(f(f(lambda i, x: x + 1.0)))(0, base)",
        "verifier",
    ),
    (
        "huge_intermediate",
        "return base + jnp.zeros((10**5, 10**5)).sum()",
        "verifier",
    ),
    (
        "huge_product",
        "x = jnp.ones((9999, 9999))\nreturn base + (x @ x @ x).sum()",
        "verifier",
    ),
    (
        "nan",
        "return base + jnp.log(-1.0 - base * base)",
        "screener",
    ),
    ("infinity", "return base + 1.0 / (base - base)", "screener"),
    (
        "much_output",
        "for _ in range(300): print('x' * 100_000)\nreturn base",
        "nothing",
    ),
    (
        "long_but_allowed_loop",
        "return lax.fori_loop(0, 9999, lambda i, x: jnp.sin(x), base)",
        "nothing",
    ),
)


def _plain():
  for name, body in _ENDLESS:
    source = _merge(body, "import itertools")
    yield Attack(name, "time", source, "wall clock", ("wall clock",))
  for name, body in _ENDLESS_WITH_IMPORTS:
    source = _merge(body, _IMPORTS)
    yield Attack(name, "time", source, "filter", ("wall clock",))
  for name, body, stopped_by in _HUGE:
    kind = "runtime" if stopped_by == "screener" else "memory"
    yield Attack(name, kind, _merge(body), stopped_by, (stopped_by,))


# --- Crashes, forged answers, later programs ---------------------------------

_CRASHES = (
    ("exit", "sys.exit()"),
    ("exit_now", "os._exit(0)"),
    ("abort", "os.abort()"),
    ("null_pointer", "ctypes.string_at(0)"),
    ("kill_itself", "os.kill(os.getpid(), signal.SIGKILL)\nos._exit(1)"),
    ("interrupt", "raise KeyboardInterrupt"),
    (
        "stack_overflow",
        "sys.setrecursionlimit(10**8)\nf = lambda *a: f(0, *a)\nf()",
    ),
    (
        "deep_c_recursion",
        "sys.setrecursionlimit(10**8)\nx = []\n"
        "for _ in range(10**5): x = [x]\nrepr(x)",
    ),
    (
        "exception_without_text",
        "class E(Exception):\n  def __str__(self): raise ValueError\nraise E",
    ),
    ("signal_all", "os.kill(-1, 0)\nraise ValueError('HARM')"),
    (
        "perf_event",
        f"ask({_number('perf_event_open')}, bytes(128), 0, -1, -1, 0)\n"
        "raise ValueError('HARM')",
    ),
    ("fork_bomb", "for _ in range(200): os.fork()"),
    ("kill_zygote", "os.kill(os.getppid(), signal.SIGKILL)\nos._exit(1)"),
    (
        "daemon",
        "if os.fork() == 0:\n  os.setsid()\n"
        "  if os.fork() == 0: time.sleep(100)\n  os._exit(0)",
    ),
    ("close_the_answer", "os.close(3)\ntime.sleep(100)"),
    (
        "inherited_descriptors",
        "for fd in range(4, 1001):\n"
        "  try: os.write(fd, b'x')\n"
        "  except OSError: continue\n"
        "  raise ValueError('HARM')\n"
        "raise OSError",
    ),
    (
        "inherited_directory",
        "for fd in range(1001):\n"
        "  try: os.fchdir(fd)\n"
        "  except OSError: continue\n"
        "  raise ValueError('HARM')\n"
        "raise OSError",
    ),
    (
        "earlier_program",
        # Of those before it, nothing is in the variables of the frames above.
        """
        frame, texts = sys._getframe(), []
        while frame:
          texts += [v for v in frame.f_locals.values() if isinstance(v, bytes)
                    and b"num_experts" in v and b"_getframe" not in v]
          frame = frame.f_back
        if texts: raise ValueError("HARM")
        raise OSError
        """,
    ),
    ("environment_of_caller", "raise ValueError(dict(os.environ))"),
    ("dns", "socket.getaddrinfo('localhost', 80, type=1)"),
)


def _answers(expression):
  return _merge(f"os.write(3, {expression})\nos._exit(0)", _IMPORTS)


_FORGED_ANSWERS = (
    ("nothing", "b''"),
    ("object", "b'{}'"),
    ("not_text", "b'\\xff' * 100"),
    ("nested", "b'[' * 50_000"),
    ("long_number", "b'9' * 10_000"),
    ("rejected_null", """b'{"rejected": null}'"""),
    ("rejected_by_other", """b'{"rejected": ["run", "x", "y"]}'"""),
    ("rejected_code", """b'{"rejected": ["trace", "a b", "y"]}'"""),
    ("rejected_type", """b'{"rejected": ["trace", "x", ["y"]]}'"""),
    ("no_leaves", """b'{"version": 1, "num_experts": 2, "leaves": []}'"""),
    ("truncated", """b'{"version": 1, "num_experts": 2, "lea'"""),
    ("not_json", "b'NaN'"),
    ("pickled", "pickle.dumps(os.system)"),
)
# Of a tampered encoder: what it does to each `block` of the program `p`.
_TAMPER = """
from selfdev_jax.sandbox import ir
ir.real = getattr(ir, "real", ir.dumps)
def forged(program):
  p = json.loads(ir.real(program))
  for leaf in p["leaves"]:
    block = leaf["block"]
    first = block["equations"][0]
    {}
  return json.dumps(p)
ir.dumps = forged
"""
_FORGED_IR = (
    ("infeed", "first[0] = 'infeed'"),
    ("outfeed", "first[0] = 'outfeed'"),
    ("callback", "first[0] = 'pure_callback'"),
    ("io_callback", "first[0] = 'io_callback'"),
    ("ffi", "first[0] = 'ffi_call'"),
    ("custom_call", "first[0] = 'custom_call'"),
    ("while", "first[0] = 'while'"),
    ("dunder", "first[0] = '__class__'"),
    ("name_is_list", "first[0] = [[]]"),
    ("other_shapes", "leaf['shape'] = [7, 7]"),
    ("absurd_shape", "leaf['shape'] = [2**62, 2**62]"),
    ("other_experts", "p['num_experts'] = 10**9"),
    ("other_version", "p['version'] = 2"),
    ("operand_unknown", "first[1] = [999, 0]"),
    ("operand_negative", "first[1] = [-1, 0]"),
    ("operand_boolean", "first[1] = [True, 0]"),
    ("operand_later", "first[1] = [block['inputs'], 0]"),
    ("operand_literal", "first[1] = [['float32', 1e999], 0]"),
    ("operands_many", "first[1] = [0] * 10**5"),
    ("outputs_many", "first[3] = 10**9"),
    ("outputs_negative", "first[3] = -1"),
    ("inputs_other", "block['inputs'] = 99"),
    ("parameters_extra", "first[2]['sharding'] = 'x'"),
    ("parameters_list", "first[2] = []"),
    (
        "iota_absurd",
        "block['equations'] += [['iota', [], {'dtype': 'float32',"
        " 'shape': [2**30, 2**30], 'dimension': 0}, 1]]",
    ),
    (
        "loop_absurd",
        "block['equations'] = [['scan', [0], {'length': 2**31, 'jaxpr':"
        " {'inputs': 1, 'equations': [], 'outputs': [0]}, 'num_consts': 0,"
        " 'num_carry': 1, 'reverse': False, 'unroll': 1}, 1]]",
    ),
    ("result_integer", "block['outputs'] = [['int32', 1]]"),
    ("result_scalar", "block['outputs'] = [['float32', 1.0]]"),
    ("results_none", "block['outputs'] = []"),
    ("results_many", "block['outputs'] *= 10**4"),
)
# Everything that the child does to itself ends with it.
_SIDE_EFFECTS = (
    ("patch_jax", "jax.numpy.sum = jax.numpy.add = None"),
    ("patch_lax", "jax.lax.add_p.bind = None"),
    ("patch_builtins", "import builtins\nbuiltins.sum = None"),
    ("patch_os", "os.fork = os.pipe = None"),
    ("patch_modules", "sys.modules.clear()"),
    ("enable_x64", "jax.config.update('jax_enable_x64', True)"),
    ("low_recursion_limit", "sys.setrecursionlimit(200)"),
    ("environment", "os.environ.clear()"),
    ("no_garbage_collector", "import gc\ngc.disable()"),
    ("deaf", "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"),
    (
        "exit_hooks",
        "import atexit\natexit.register(open, '$victim/new', 'w')",
    ),
    (
        "finalizer",
        "class X:\n  def __del__(self): open('$victim/new', 'w')\n"
        "sys.kept = X()",
    ),
    ("close_output", "os.close(1)\nos.close(2)"),
)


def _inside():
  for name, body in _CRASHES:
    source = _merge(body, _IMPORTS)
    yield Attack(name, "process", source, "filter", ("trace",))
  for name, expression in _FORGED_ANSWERS:
    yield Attack(
        f"answer_{name}",
        "forged answer",
        _answers(expression),
        "filter",
        ("verifier",),
    )
  yield Attack(
      "answer_with_escapes",
      "forged answer",
      _answers(
          r"""json.dumps({'rejected': ['trace', 'x', '\x1b[31m\u202e' +"""
          r""" 'a\n' * 5000]}).encode()"""
      ),
      "filter",
      ("trace",),
  )
  yield Attack(
      "answer_without_end",
      "forged answer",
      _merge("while True: os.write(3, b'x' * 99_999)", _IMPORTS),
      "filter",
      ("pipe cap",),
  )
  for name, change in _FORGED_IR:
    head = _IMPORTS + _TAMPER.format(change)
    source = _merge("return base + sum(task_vectors)", head)
    yield Attack(f"ir_{name}", "forged IR", source, "filter", ("verifier",))
  for name, body in _SIDE_EFFECTS:
    source = _merge(body + "\nreturn base + sum(task_vectors)", _IMPORTS)
    yield Attack(f"later_{name}", "later programs", source, "filter", ())


ATTACKS: Sequence[Attack] = (
    *_kernel("files", _FILES),
    *_kernel("processes", _PROCESSES),
    *_kernel("network", _CONNECTIONS),
    *_kernel("memory", _MEMORY),
    *_language(),
    *_plain(),
    *_inside(),
)
