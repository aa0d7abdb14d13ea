"""What supports the prediction before and after an attack, and which patches of the perturbation are effective?"""

from ce_plugin import CausalEffect
from ce_plugin.datasets import sample_photographs
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import Adversarial
from ce_plugin.models import efficientnet_lite0

network = efficientnet_lite0()
x = network.inputs([sample_photographs()["china.jpg"]])
palace = network.class_index("palace")

# Sizes are in image units, here 0 to 255: at most 8 grey levels per value.
attack = Adversarial.pgd(network.model, eps=8, clip_values=(0, 255), normalization=network.normalization)
attacked = attack.perturb(x)
print("before:", network.class_name(int(network.model(x).argmax())))
print("after: ", network.class_name(int(network.model(attacked).argmax())))

# 1. Evidence: the attack holds in every trial, and patches are covered as always.
explainer = CausalEffect(network.model, outcome="log_odds", normalization=network.normalization)
clean = explainer.attribute(x, target=palace)
under_attack = explainer.attribute(x, target=palace, given=attack)
print(f"largest contribution to 'palace': {clean.max():.2f} clean, {under_attack.max():.2f} under attack")

# 2. Intervention: patch by patch, the attack is what `do` sets. Which patches alone hurt the answer most?
carriers = CausalEffect(network.model, attack, OneAtATime(), outcome="log_odds").estimate(x, target=palace)
hurt = carriers.effect[0, :, 0]
print(f"the attack in one patch alone changes the log-odds by {hurt.min():.2f} (worst) to {hurt.max():.2f}")
carriers.plot(network.pictures(x)[0], title="patches of the photograph that the attack works on").savefig(
    "carriers.png"
)
