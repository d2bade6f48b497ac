"""The application: all routes and the layers around them. No other package of the gateway imports from here."""
