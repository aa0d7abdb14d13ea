"""Quick start: which parts of a photograph cause the answer of an ImageNet network?"""

from ce_plugin import CausalEffect
from ce_plugin.datasets import sample_photographs
from ce_plugin.models import efficientnet_lite0

network = efficientnet_lite0()  # its weights come with the extra `demo`
x = network.inputs([sample_photographs()["flower.jpg"]])  # (1, 3, 224, 224)

# A map as every Captum attribution gives it: positive patches support the predicted class.
explainer = CausalEffect(
    network.model, outcome="log_odds", normalization=network.normalization, class_names=network.class_names
)
contribution = explainer.attribute(x)  # (1, 3, 224, 224)

# All patches x all classes from the same trials, each patch by itself, with standard errors; and one region of them
# that is covered and compared with random places.
estimate = explainer.estimate(x, answer=True)
print(estimate.summary())

# The same as a picture, that region outlined. In a notebook `estimate` alone shows picture, sentence and numbers.
estimate.plot().savefig("quickstart.png")
