python -m kser.embedded --topic orders
