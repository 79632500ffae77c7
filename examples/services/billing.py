"""Billing: a service whose methods say in the proto who may call them."""

from pathlib import Path
from typing import Any

from authsvc_client import AuthsvcClient, caller
from services.run import Service, main, serve
from services.v1 import billing_pb2, billing_pb2_grpc


class Billing(billing_pb2_grpc.BillingServiceServicer):
    """By the time that a method runs, its caller has been judged."""

    async def Charge(
        self, request: billing_pb2.ChargeRequest, context: Any
    ) -> billing_pb2.ChargeResponse:
        """Charges an order."""
        return billing_pb2.ChargeResponse(charged_for=caller().client_id)

    async def Refund(
        self, request: billing_pb2.RefundRequest, context: Any
    ) -> billing_pb2.RefundResponse:
        """Gives the money back to whom the token speaks for, whoever brings it."""
        who = caller()
        return billing_pb2.RefundResponse(
            refunded_to=who.subject, asked_by=next(iter(who.claims.actors), "")
        )


async def run(service: Service, authsvc: AuthsvcClient, port_file: Path) -> None:
    """Serves billing."""
    descriptor = billing_pb2.DESCRIPTOR.services_by_name["BillingService"]
    await serve(
        service,
        authsvc,
        descriptor,
        lambda server: billing_pb2_grpc.add_BillingServiceServicer_to_server(Billing(), server),
        port_file,
    )


if __name__ == "__main__":
    main("billing", run)
