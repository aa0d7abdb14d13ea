"""Which channels of a layer cause the prediction, for which classes, and where in the photograph does that happen?"""

from ce_plugin import CausalEffectMap, LayerCausalEffect
from ce_plugin.datasets import sample_photographs
from ce_plugin.models import efficientnet_lite0
from ce_plugin.visualization import overlay

network = efficientnet_lite0()
x = network.inputs([sample_photographs()["flower.jpg"]])  # (1, 3, 224, 224)
layer = "_bn1"  # after the last convolution, before its activation: 1280 channels of 7 x 7

# The effect of setting each channel to zero, one at a time, on each of 1000 classes.
explainer = LayerCausalEffect(network.model, layer, outcome="logit")
print(explainer.estimate_cost(x))
estimate = explainer.estimate(x)
answer = int(estimate.predicted[0])

contribution = estimate.contribution[0]  # (1280, 1000): minus the effect, positive supports the class
print(f"channels that support '{network.class_name(answer)}' most:")
for channel in contribution[:, answer].argsort(descending=True)[:5].tolist():
    others = [network.class_name(c) for c in contribution[channel].argsort(descending=True)[:3].tolist()]
    print(f"  {channel}: {contribution[channel, answer]:.2f}; the classes that it supports most: {', '.join(others)}")

# A map for every class from one run, and a contrastive map: why this class rather than the runner-up? Contributions lie
# where a channel's change is seen behind the activation. `CausalEffectMap(network.model)` finds the last layer itself.
cem = CausalEffectMap(network.model, layer)
maps = cem.maps(x)  # (1, 1000, 7, 7)
runner_up = int(network.model(x)[0].topk(2).indices[1])
contrast = cem.attribute(x, target=answer, contrast=[runner_up])  # (1, 1, 7, 7)
print(f"the map of '{network.class_name(answer)}' adds up to {maps[0, answer].sum():.2f}")
print(f"rather than '{network.class_name(runner_up)}': {contrast.sum():.2f}")
enlarged = CausalEffectMap.interpolate(contrast, x.shape[2:], "bilinear")
overlay(enlarged[0], network.pictures(x)[0]).savefig("nodes.png")
