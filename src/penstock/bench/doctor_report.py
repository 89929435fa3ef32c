"""A checkup in words: each figure with what it means for tokens a second, then what is off."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.bench.doctor import PROMPT, UNTESTED, WEIGHTS, Checkup, Concern, best_set, decode_limit, prompt_limit

GB, GIB = 1e9, 1 << 30
NOTICED = 0.01
"""Share of the time that may go elsewhere without a word."""
UNSTEADY = 0.15
"""Two measurements of one machine agree so far when it is quiet."""
CROWDED = 0.05
"""Share of the time in which processes may wait for a processor without a word: a timer's tick is soon served."""
SLOW = 0.6
"""Share of its clock that a core should have under load; with all cores busy none has its highest."""
LITTLE = 2 * GIB


def concerns(c: Checkup) -> list[Concern]:
    return [*_build(c), *_room(c), *_company(c)]


def _build(c: Checkup) -> Iterator[Concern]:
    best, chosen = best_set(c.features), c.usable[0] if c.usable else "torch"
    if not c.usable:
        why = f"{c.native_error}; torch computes, slower and without one answer"
        yield Concern("The native kernels are missing", why, "install g++ and python3-dev and install penstock again")
    elif best != chosen and c.features:
        why = f"the processor could run {best}, and the best kernels of this build that it can use are {chosen}"
        yield Concern("The kernels are not the processor's best", why, "install it here, with a new compiler")
    elif chosen == "portable" and "avx" in c.features:
        why = "the processor has no AVX2 with FMA and F16C, so plain loops compute"
        yield Concern("The processor is old", why, "expect a fraction of the speed below")
    if c.nvidia > len(c.devices):
        why = f"the driver knows {c.nvidia} GPUs and torch can use {len(c.devices)}"
        yield Concern("A GPU is not used", why, "install a torch built for its CUDA")
    if c.disk is None:
        yield Concern(f"The disk of {c.folder} was not measured", c.disk_error, "name a folder that can be written")


def _room(c: Checkup) -> Iterator[Concern]:
    if c.processors < c.online:
        why = f"{c.processors} of {c.online} may be used (affinity, or the quota of a control group)"
        yield Concern("Some processors are out of reach", why, "raise the limit if speed is wanted")
    if c.threads < c.processors:
        why = f"{c.threads} threads on {c.processors} processors"
        yield Concern("Fewer threads than processors", why, "unset OMP_NUM_THREADS, or give --num-threads")
    if c.memory < LITTLE:
        yield Concern("Little memory is free", f"{c.memory / GIB:.1f} GiB", "stop what else runs, or use --quant int4")
    if c.watch.swapped:
        why = f"{c.watch.swapped} pages moved in {c.watch.seconds:.0f} s; {c.swap_used / GIB:.1f} GiB lie in swap"
        yield Concern("The machine is swapping", why, "free memory: a weight that is swapped out costs a disk's read")


def _company(c: Checkup) -> Iterator[Concern]:
    w = c.watch
    if w.stolen > NOTICED:
        why = f"{100 * w.stolen:.1f} % of the processors' time in {w.seconds:.0f} s: tokens/s are lower by as much"
        yield Concern("The hypervisor takes time away", why, "measure at another hour, or use dedicated processors")
    if w.others > NOTICED * c.processors:
        names = ", ".join(f"{name} (pid {pid}) {taken:.2f}" for name, pid, taken in w.busiest)
        why = f"{w.others:.2f} of {c.online} processors are busy with others{f': {names}' if names else ''}"
        yield Concern("Other processes are running", why, "stop them before anything is measured")
    if w.waited > CROWDED:
        why = f"processes waited for a processor {100 * w.waited:.0f} % of the time"
        yield Concern("There is more to do than processors", why, "stop what else runs, or use fewer threads")
    if w.throttled > NOTICED * w.seconds:
        why = f"a control group stopped its processes for {w.throttled:.1f} s of {w.seconds:.0f}"
        yield Concern("The quota is used up", why, "raise it, or use fewer threads than it allows processors")
    if w.hot:
        yield Concern("The processor is too hot", f"cores slowed down {w.hot} times", "see to its cooling")
    if w.stalled > NOTICED:
        why = f"a thread was stopped {100 * w.stalled:.1f} % of the time, once for {1000 * w.longest:.0f} ms"
        yield Concern("Work is interrupted", why, "some tokens will come as much later")
    if c.clocks is not None and c.clocks[0] < SLOW * c.clocks[1]:
        why = "the fastest core had {:.1f} of {:.1f} GHz after a measurement, governor {}".format(*c.clocks)
        yield Concern("The processor is clocked low", why, "set the governor to performance, or plug the machine in")
    for name, what in (("read_rate", "reading"), ("fp32", "fp32 products"), ("int8", "int8 products")):
        rates = sorted(getattr(window, name) for window in c.windows)
        least, most = rates[1 % len(rates)], rates[-2:][0]  # one that met something tells nothing of the others
        if least < (1 - UNSTEADY) * most:
            why = f"{', '.join(f'{rate / GB:.1f}' for rate in rates)} G/s within {w.seconds:.0f} s"
            yield Concern(f"The rate of {what} is not steady", why, "no figure here is worth more than that")


def _group(c: Checkup) -> tuple[str, str]:
    quota = "no quota" if c.quota is None else f"{c.quota:g} processors"
    size = "no limit of memory" if c.memory_limit is None else f"{c.memory_limit / GIB:.1f} GiB"
    meaning = "" if c.quota is None else "more threads than that are stopped in turn, each token with them"
    if c.memory_limit is not None:
        meaning += "; " * bool(meaning) + "a process that takes more memory is killed"
    return f"{quota}, {size}", meaning


def table(c: Checkup) -> str:
    rates, w = c.limits, c.watch
    threads = f"{c.threads} thread{'s' * (c.threads != 1)}"
    model = f"a model of {WEIGHTS / GB:.2f} GB of weights (Qwen3-0.6B, 8 bits)"
    kernels = f"{c.usable[0]}, of {', '.join(c.usable)}" if c.usable else "none: torch computes"
    answer = "one answer: the bits of a token depend on this choice" if c.usable else "no one answer"
    if c.usable and (untested := UNTESTED.get(c.usable[0])):
        answer += f"; untested on hardware: {untested}"
    disk = "not measured" if c.disk is None else f"{c.disk / GB:.2f} GB/s, {c.folder}"
    gpus = ", ".join(f"{name} {size / GIB:.0f} GiB" for name, size in c.devices)
    linked = "each reaches the others' memory" if c.linked else "they do not reach each other's memory"
    quiet = (
        f"{100 * w.stolen:.1f} % stolen, {w.others:.2f} processors busy with others, {100 * w.stalled:.1f} % stalled"
    )
    clock = "" if c.clocks is None else ", at {:.1f} of {:.1f} GHz".format(*c.clocks)
    rows = [
        ("processor", f"{c.processor}: {c.processors} of {c.online} processors{clock}", f"{threads} compute"),
        ("kernels", kernels, answer),
        ("cgroup", *_group(c)),
        ("memory", f"{c.memory / GIB:.1f} GiB free of {c.memory_total / GIB:.1f}", "weights and KV must fit into it"),
        ("reading", f"{rates.read_rate / GB:.1f} GB/s", f"{model} decodes at most {decode_limit(rates):.0f} tokens/s"),
        (
            "products",
            "fp32 {:.3g}, bf16 {:.3g}, int8 {:.3g} GOP/s".format(
                *(r / GB for r in (rates.fp32, rates.bf16, rates.int8))
            ),
            f"it takes at least {prompt_limit(rates):.2f} s to read a prompt of {PROMPT} tokens",
        ),
        ("disk", disk, "" if c.disk is None else f"it is loaded in at least {WEIGHTS / c.disk:.1f} s"),
        ("GPU", gpus or "none", linked if len(c.devices) > 1 else ""),
        (f"{w.seconds:.0f} s", quiet, f"a token may come {1000 * w.longest:.1f} ms late"),
    ]
    lines = [f"{name:10} {found}{f'  ->  {meaning}' if meaning else ''}" for name, found, meaning in rows]
    off = concerns(c)
    lines += ["", "off:" if off else "nothing is off"]
    for concern in off:
        lines += [f"  {concern.what}: {concern.why}", f"    fix: {concern.fix}"]
    return "\n".join(lines)
