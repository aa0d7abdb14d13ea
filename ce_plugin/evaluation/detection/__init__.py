"""A harness for detectors of adversarial examples: attacks, protocols, figures."""
