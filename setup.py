"""What of Graft is compiled at installation; pyproject.toml has all the rest.

It is optional: without a compiler or Python's headers nothing is built, and plain Python serves in its place.
"""

import contextlib
import os
import runpy
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OPTIONS = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]
PROGRAMS = {
    "graft.swap.graft-wait": "graft/swap/compiled_waiter/waiter.c",
    "graft.oci.graft-hook": "graft/oci/compiled/hook.c",
    "graft.bench.graft-peer": "graft/bench/compiled/peer.c",
}
NATIVE = "graft.splice.native"
MYPY_OPTIONS = ["--python-version=3.11", "--ignore-missing-imports", "--follow-imports=silent", "--config-file="]


def native_modules():
    """The extensions that mypyc makes of modules of graftd; none where there is no mypyc, or it refuses them."""
    sources = runpy.run_path("graft/splice/native/sources.py")
    library = sources["library"](Path("graft/splice"))
    paths = [f"graft/splice/{name}.py" for name in sources["MODULES"]]
    try:
        from mypyc.build import mypycify

        made = mypycify([*MYPY_OPTIONS, *paths], group_name=library.removesuffix("__mypyc"), target_dir="build/mypyc")
    except (ImportError, SystemExit) as problem:
        print(f"graftd is not compiled: {problem}")
        return []
    for extension in made:  # beside the sources everybody would import them
        extension.name = f"{NATIVE}.{extension.name.split('.')[-1]}"
        extension.optional = True
    return made


class BuildAll(build_ext):
    """Builds extensions, and programs."""

    def run(self):
        """Build all, in place of what was compiled from other sources."""
        for old in glob("graft/splice/native/*.so"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old)
        super().run()

    def get_ext_filename(self, fullname):
        """Where what was built is put; ``fullname`` with or without its package."""
        parts = fullname.split(".")
        is_program = any(name.split(".")[-1] == parts[-1] for name in PROGRAMS)
        return os.path.join(*parts) if is_program else super().get_ext_filename(fullname)

    def build_extension(self, ext):
        """Compile and link one of them."""
        if ext.name not in PROGRAMS:
            super().build_extension(ext)
            return
        objects = self.compiler.compile(ext.sources, output_dir=self.build_temp, extra_postargs=OPTIONS)
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.compiler.link_executable(objects, target)


setup(
    cmdclass={"build_ext": BuildAll},
    ext_modules=[
        Extension(
            "graft.swap._fast_calls",
            sorted(glob("graft/swap/compiled/*.c")),
            include_dirs=["bpf"],  # graft.h
            depends=["setup.py", "bpf/graft.h", *glob("graft/swap/compiled/*.h")],
            extra_compile_args=[*OPTIONS, "-fvisibility=hidden", "-Wno-cast-function-type"],
            py_limited_api=True,
            optional=True,
        ),
        *(Extension(name, [source], depends=["setup.py"], optional=True) for name, source in PROGRAMS.items()),
        *native_modules(),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
