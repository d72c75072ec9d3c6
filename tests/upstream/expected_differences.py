"""Where torch's own tests of SGD and its averages end differently with our classes, and why.

``run.py`` compares this list with what it finds, both ways: a difference that is not here is an
error, and so is one that is here and does not occur.
"""

#: By the name of the test, with wildcards where it depends on the machine's devices.
EXPECTED_DIFFERENCES: dict[str, str] = {
    "TestOptimRenewed*::test_fused_error_on_params_on_meta_SGD_*": (
        "The test wants fused=True to refuse parameters on the meta device, where torch's fused "
        "kernel does not run. fused selects nothing here: what no kernel of ours reaches is run by "
        "torch's operations, and they work on meta."
    ),
}
