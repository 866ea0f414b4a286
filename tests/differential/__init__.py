"""The proof that kser equals the published package 0.8.27, except where it was decided otherwise.

======================= ==============================================================================================
``scenarios/``          plain scripts, a function for each case; they name the rows of ``rows.txt`` that they cover
``recorder.py``         what they print with: a trace in which only what changes from run to run is replaced
``wire.py``             a broker seen through a plain kafka-python, for the scenarios that declare ``TOPICS``
``looping.py``          ends for the consumers of scenarios
``rows.txt``            every row of the behaviour page, sections 1 to 8
``differences.txt``     every intended difference, under the number of its decision (``docs/differences.rst``)
``oracle.py``           the published package in an environment of its own
``harness.py``          runs a scenario under both packages and compares
``verdicts.py``         whether a package takes an input, for the property test
======================= ==============================================================================================

Neither side is looked into: the published package is only run. When behaviour changes on purpose, the failing test
prints what to put into ``differences.txt``, but for the number of the decision. A new row needs a case that names it.
"""
