"""Papers that plugins of several kinds stand on, as BibTeX."""

COHEN_2019 = """@inproceedings{cohen2019certified,
  title     = {Certified Adversarial Robustness via Randomized Smoothing},
  author    = {Jeremy Cohen and Elan Rosenfeld and J. Zico Kolter},
  booktitle = {International Conference on Machine Learning},
  year      = {2019}
}"""

GOODFELLOW_2015 = """@inproceedings{goodfellow2015explaining,
  title     = {Explaining and Harnessing Adversarial Examples},
  author    = {Ian J. Goodfellow and Jonathon Shlens and Christian Szegedy},
  booktitle = {International Conference on Learning Representations},
  year      = {2015}
}"""

GOWAL_2018 = """@article{gowal2018effectiveness,
  title   = {On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models},
  author  = {Sven Gowal and Krishnamurthy Dvijotham and Robert Stanforth and Rudy Bunel and Chongli Qin and
             Jonathan Uesato and Relja Arandjelovic and Timothy Mann and Pushmeet Kohli},
  journal = {arXiv preprint arXiv:1810.12715},
  year    = {2018}
}"""

MADRY_2018 = """@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Aleksander Madry and Aleksandar Makelov and Ludwig Schmidt and Dimitris Tsipras and Adrian Vladu},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}"""

TRAMER_2018 = """@inproceedings{tramer2018ensemble,
  title     = {Ensemble Adversarial Training: Attacks and Defenses},
  author    = {Florian Tram{\\`e}r and Alexey Kurakin and Nicolas Papernot and Ian Goodfellow and Dan Boneh and
               Patrick McDaniel},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}"""

WONG_2018 = """@inproceedings{wong2018provable,
  title     = {Provable Defenses against Adversarial Examples via the Convex Outer Adversarial Polytope},
  author    = {Eric Wong and J. Zico Kolter},
  booktitle = {International Conference on Machine Learning},
  year      = {2018}
}"""

ZHANG_2020 = """@inproceedings{zhang2020towards,
  title     = {Towards Stable and Efficient Training of Verifiably Robust Neural Networks},
  author    = {Huan Zhang and Hongge Chen and Chaowei Xiao and Sven Gowal and Robert Stanforth and Bo Li and
               Duane Boning and Cho-Jui Hsieh},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}"""
