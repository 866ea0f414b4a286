import logging
logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s"
)

import uuid
from kser.python_kafka.producer import Producer
from kser.schemas import Message

pro = Producer()
pro.send('dice', Message(uuid=str(uuid.uuid4()), entrypoint="__main__.DiceLaunch"))
