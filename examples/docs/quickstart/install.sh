python -m pip install '.[embedded,flask]'
