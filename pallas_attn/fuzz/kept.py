"""Seeds of calls that once failed: they always run, by what they failed on."""

KEPT: dict[str, tuple[int, ...]] = {
    "xla": (3,),
    "kernels": (),
}
