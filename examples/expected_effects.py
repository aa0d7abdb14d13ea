"""Which channels matter over a data set, and what does an attack change? A table of effects, and questions to it."""

from pathlib import Path
from tempfile import mkdtemp

from ce_plugin import LayerCausalEffect
from ce_plugin.datasets import digits
from ce_plugin.expected import EffectTable, Sample, Subset, run
from ce_plugin.interventions import Adversarial
from ce_plugin.models import DigitsCNN

images, labels = digits()
network = DigitsCNN.trained(images[:1000], labels[:1000])
data = [Sample(image, int(label)) for image, label in zip(images[1000:1400], labels[1000:1400], strict=True)]

# One row an image and evidence. A run that is stopped goes on with resume=True; the network is not needed afterwards.
folder = Path(mkdtemp(), "effects")
run(
    LayerCausalEffect(network, "features.3", outcome="log_odds"),
    data,
    folder,
    given={"clean": None, "FGSM": Adversarial.fgsm(network, eps=0.1)},
    outcomes=["log_odds", "prediction_weighted"],
)

table = EffectTable(folder)
print(table)
correct = table.expected("log_odds", subset=Subset(correct=True))
print(correct)
print(f"{int(correct.significant(fdr=0.05)[0].sum())} of {correct.effect.shape[1]} channels matter")

# Does the attack change what channels do? Differences are paired on the same images.
for outcome in table.outcomes:
    change = table.expected(outcome).difference("FGSM", "clean")
    largest = change.to_dataframe().sort_values("p_value").iloc[0]
    print(
        f"{outcome}: channel {largest['label']} most, by {largest['effect']:+.3g} "
        f"({largest['ci_low']:+.3g} to {largest['ci_high']:+.3g})"
    )
correct.plot("clean").savefig(folder / "channels.png")
