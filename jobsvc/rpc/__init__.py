"""The gRPC face of the service: validate, convert, call a service, convert back."""
