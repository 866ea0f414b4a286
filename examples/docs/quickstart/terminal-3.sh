python order.py
