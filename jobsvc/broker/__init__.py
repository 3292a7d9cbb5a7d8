"""RabbitMQ through Kombu: names, connections, confirmed publishing, fan-out.

The broker is never the truth. Everything on it can be made again from the database, so whatever
looks wrong here ends in closing the connection and starting over.
"""
