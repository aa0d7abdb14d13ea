"""Quick start: which parts of a photograph cause the answer of an ImageNet network?"""

from ce_plugin import CausalEffect
from ce_plugin.datasets import sample_photographs
from ce_plugin.models import efficientnet_lite0

network = efficientnet_lite0()  # its weights come with the extra `demo`
x = network.inputs([sample_photographs()["flower.jpg"]])  # (1, 3, 224, 224)

# A map as every Captum attribution gives it: positive patches support the predicted class.
explainer = CausalEffect(network.model, outcome="log_odds", normalization=network.normalization)
contribution = explainer.attribute(x)  # (1, 3, 224, 224)

# All patches x all classes from the same trials, each patch by itself, with standard errors.
estimate = explainer.estimate(x)
answer = int(estimate.predicted[0])
significant = estimate.significant(fdr=0.05)[0, :, answer]
print(f"{network.class_name(answer)}: {int(significant.sum())} of {len(significant)} patches matter by themselves")

# The same as a picture, significant patches outlined.
estimate.plot(network.pictures(x)[0]).savefig("quickstart.png")
