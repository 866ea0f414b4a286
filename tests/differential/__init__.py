"""Differential tests: kser behaves as the published package 0.8.27, except for the accepted differences.

=============================== ======================================================================================
``scenarios/``                  scripts with one function for each case, which names the rows of ``rows.txt`` it covers
``recorder.py``                 prints the trace of a scenario, with placeholders for values that vary between runs
``wire.py``                     access to a broker with kafka-python, for the scenarios that declare ``TOPICS``
``looping.py``                  helpers for the scenarios that run a consumer
``rows.txt``                    every row of the behaviour page, sections 1 to 8
``accepted_differences.txt``    every accepted difference, with the numbers of its decisions (``docs/differences.rst``)
``accepted_differences.py``     reads that list
``published_package.py``        builds a virtual environment with the published package
``harness.py``                  runs a scenario with both packages and compares the traces
``verdicts.py``                 reports whether a package accepts a message, for the property test
=============================== ======================================================================================

Tests run the published package and do not read its code. After an intended change of behaviour, the failing test
prints the entry for ``accepted_differences.txt``, without the number of the decision. A new row needs a case that
names it.
"""
