"""`pi0fm verify BUNDLE`: infer the bundle's recorded observation here, and compare the chunk with the recorded one.

Owns: the options, the order of checks that tells device from conversion, the table and the exit code. Does not know: the comparison.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pi0fm.cli.bench import rounded, show
from pi0fm.options import option, required
from pi0fm.policy.load_options import LoadOptions
from pi0fm.progress import say
from pi0fm_client.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from pi0fm.policy.saved.reference import Agreement

HELP = "check that this machine computes the bundle's recorded chunk: device, versions, conversion"
POSITIONAL = "bundle"
ALIASES = {"policy.path": "bundle"}


@dataclass(frozen=True)
class VerifyOptions:
    """A bundle, and how to run it here."""

    bundle: Path = required("folder of the policy")
    against: Path | None = option(None, "another bundle, whose recorded observation and chunk are used: for a converted bundle its source")
    device: str | None = option(None, "cpu, cuda or cuda:N; the best one that works when not given")
    precision: str = option("auto", "auto, float32 or bfloat16, of the towers' matrices")
    threads: int | None = option(None, "CPU threads of one inference; torch's choice when not given")
    compile: str = option("off", "off, kernels or graph, as in pi0fm serve")
    tolerance: float | None = option(
        None, "largest difference that agrees, in deviations of the recorded actions; 0.001 in float32 and 0.05 in bfloat16 when not given"
    )

    def __post_init__(self) -> None:
        self.loading()
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"--tolerance must be above 0, found {self.tolerance}; leave it out for the default")

    def loading(self) -> LoadOptions:
        """Return the load options."""
        return LoadOptions(device=self.device, precision=self.precision, threads=self.threads, compile=self.compile)


Options = VerifyOptions


def run(options: VerifyOptions) -> None:
    """Print a table and a last line of JSON. Raises BundleError (exit code 1) for a chunk that differs."""
    from pi0fm.policy.saved import bundle, reference  # torch: seconds, which --help need not wait for

    recorded = reference.read(options.bundle if options.against is None else options.against)
    policy = bundle.load(options.bundle, options.loading())
    found = {"here": reference.compare(policy, recorded, options.tolerance)}
    known, here = policy.metadata["identity"], found["here"].here
    plain = here["device"].startswith("cpu") and (here["numbers"], here["compile"]) == ("float32", "off")
    if not (found["here"].agrees or plain):  # run it as it was recorded, to tell the device from the conversion
        del policy
        policy = bundle.load(options.bundle, LoadOptions(device="cpu", precision="float32", threads=options.threads))
        found["float32 on a CPU"] = reference.compare(policy, recorded)
    figures = {name: each.json() for name, each in found.items()}
    shown = ("largest", "mean_square", "another_seed", "tolerance")
    show({name: {each: rounded(figures[name][each]) for each in shown} for name in figures})
    for name, (there, now) in found["here"].differs.items():
        say(f"{name}: {there} when it was recorded, {now} here")
    agrees = all(each.agrees for each in found.values())
    sys.stdout.write(json.dumps(rounded({"agrees": agrees, "identity": known, "recorded_by": recorded.of, **figures})) + "\n")
    sys.stdout.flush()
    if not agrees:
        raise BundleError(_verdict(options, found))
    say(f"{options.bundle} ({known}) gives the recorded chunk here")


def _verdict(options: VerifyOptions, found: "dict[str, Agreement]") -> str:
    here, as_recorded = found["here"], found.get("float32 on a CPU")
    line = f"{options.bundle} must give the recorded chunk within {here.tolerance:g} deviations, found {here.largest:.3g} apart (another "
    line += f"noise seed: {here.another_seed:.3g})"
    if as_recorded is not None and as_recorded.agrees:
        return f"{line}; in float32 on a CPU it agrees, so it is {here.here['device']} in {here.here['numbers']}, compile {options.compile}"
    changed = ", ".join(name for name in here.differs if name not in ("device", "numbers", "compile", "threads"))
    causes = [*(["the conversion"] if options.against is not None else []), *([f"another {changed}"] if changed else [])]
    return f"{line}; it is {' or '.join(causes) or 'this processor'}: convert it again, or install the versions that it was made with"
