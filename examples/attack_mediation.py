"""Through which channels does an attack change the prediction, and are they the same on other views of the flower?"""

import torch

from ce_plugin import CausalMediation
from ce_plugin.datasets import sample_photographs
from ce_plugin.effects import plot_carriers
from ce_plugin.interventions import Adversarial
from ce_plugin.models import efficientnet_lite0

network = efficientnet_lite0()
photograph = sample_photographs()["flower.jpg"]
views = [photograph[:, :, left : left + 427] for left in range(20, 200, 15)]
x = torch.cat([network.inputs([view]) for view in views])  # (12, 3, 224, 224)
daisy = network.class_index("daisy")

# At most 4 of 255 grey levels per value, five steps.
attack = Adversarial.pgd(
    network.model, eps=4, max_iter=5, clip_values=network.value_range, normalization=network.normalization
)
mediation = CausalMediation(network.model, "_bn1", attack)  # the last convolution's 1280 channels

# Total effect on the logit of "daisy", and how much of it each channel carries by itself.
found = mediation.estimate(x[:6], target=daisy)
shares = found.share()
print(f"total effect on 'daisy': {shares.total:.1f} [{shares.total_low:.1f}, {shares.total_high:.1f}]")
print(shares.to_dataframe().head(5)[["label", "indirect_share", "direct_share"]].round(4).to_string(index=False))
if found.cut:
    print("everything passes through this layer, so all channels together carry 100 % by construction")

# How many of them are enough? Ranked on six views, tested on the other six.
carriers = mediation.carriers(x[:6], x[6:], targets=(daisy, daisy))
print(carriers)
plot_carriers(carriers).savefig("attack_mediation.png")
