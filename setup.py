"""The one part of Graft that is compiled at installation; pyproject.toml has all the rest.

It is optional: without a compiler or Python's headers nothing is built, and plain Python serves in its place.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "graft.swap._fast_calls",
            sorted(glob("graft/swap/compiled/*.c")),
            include_dirs=["bpf"],  # graft.h
            depends=["setup.py", "bpf/graft.h", *glob("graft/swap/compiled/*.h")],
            extra_compile_args=[
                "-O2",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                "-Wno-cast-function-type",
            ],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
