"""Orders: a service that is called with a token, and calls the next one with its own."""

import asyncio
from pathlib import Path
from typing import Any

import grpc

from authsvc_client import AuthsvcClient, AuthsvcError, caller, channel
from authsvc_client.errors import error_trailers
from services.run import Service, main, serve
from services.v1 import billing_pb2, billing_pb2_grpc, orders_pb2, orders_pb2_grpc

AT_ONCE = 32
BILLING = "https://billing.example"


class Orders(orders_pb2_grpc.OrdersServiceServicer):
    """Takes orders."""

    def __init__(
        self,
        billing: "billing_pb2_grpc.BillingServiceAsyncStub",
        for_others: "billing_pb2_grpc.BillingServiceAsyncStub",
        authsvc: AuthsvcClient,
        client_id: str,
    ) -> None:
        """`billing` is called with a token of our own, `for_others` with one for our caller."""
        self._billing = billing
        self._for_others = for_others
        self._authsvc = authsvc
        self._client_id = client_id

    async def PlaceOrders(
        self, request: orders_pb2.PlaceOrdersRequest, context: Any
    ) -> orders_pb2.PlaceOrdersResponse:
        """Charges each order by a call to billing, some at once."""
        room = asyncio.Semaphore(AT_ONCE)

        async def charge(number: int) -> None:
            async with room:
                await self._billing.Charge(
                    billing_pb2.ChargeRequest(order_id=str(number), cents=100)
                )

        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(request.count):
                    tasks.create_task(charge(number))
        except ExceptionGroup as refusals:
            await hand_on(refusals.exceptions[0], context)
        return orders_pb2.PlaceOrdersResponse(charged=request.count)

    async def CancelOrder(
        self, request: orders_pb2.CancelOrderRequest, context: Any
    ) -> orders_pb2.CancelOrderResponse:
        """Hands billing's refusal on, if it comes to that."""
        try:
            await self._billing.Refund(billing_pb2.RefundRequest(order_id=request.order_id))
        except grpc.aio.AioRpcError as error:
            await hand_on(error, context)
        return orders_pb2.CancelOrderResponse()

    async def ListOrders(
        self, request: orders_pb2.ListOrdersRequest, context: Any
    ) -> orders_pb2.ListOrdersResponse:
        """By now authsvc has said that the person is permitted to, as things stand."""
        return orders_pb2.ListOrdersResponse(asked_by=caller().subject)

    async def ReturnOrder(
        self, request: orders_pb2.ReturnOrderRequest, context: Any
    ) -> orders_pb2.ReturnOrderResponse:
        """Exchanges the caller's token for one to act for the caller at billing (RFC 8693)."""
        try:
            token = await self._authsvc.exchange(
                self._client_id, caller().token, ["billing.refund"], [BILLING]
            )
            refund = await self._for_others.Refund(
                billing_pb2.RefundRequest(order_id=request.order_id),
                metadata=(("authorization", f"Bearer {token.value}"),),
            )
        except AuthsvcError as error:
            text = f"exchange: {error.message}"
            trailers = error_trailers(error.code, text, error.reason, error.metadata)
            await context.abort(error.code, text, trailers)
        except grpc.aio.AioRpcError as error:
            await hand_on(error, context)
        return orders_pb2.ReturnOrderResponse(
            refunded_to=refund.refunded_to, asked_by=refund.asked_by
        )


async def hand_on(error: BaseException, context: Any) -> None:
    """Answers what billing answered, with its reason."""
    if not isinstance(error, grpc.aio.AioRpcError):
        raise error
    trailers = tuple(error.trailing_metadata())
    await context.abort(error.code(), f"billing: {error.details()}", trailers)


async def run(service: Service, authsvc: AuthsvcClient, port_file: Path) -> None:
    """Serves orders. The token source keeps a fresh token for billing at hand."""
    descriptor = orders_pb2.DESCRIPTOR.services_by_name["OrdersService"]
    own = authsvc.token_source(service.client_id, ["billing.charge"], [BILLING])
    async with (
        own as tokens,
        channel(service.billing, service.certificates, token_source=tokens) as to_billing,
        channel(service.billing, service.certificates) as for_others,
    ):
        orders = Orders(
            billing_pb2_grpc.BillingServiceStub(to_billing),
            billing_pb2_grpc.BillingServiceStub(for_others),
            authsvc,
            service.client_id,
        )
        await serve(
            service,
            authsvc,
            descriptor,
            lambda server: orders_pb2_grpc.add_OrdersServiceServicer_to_server(orders, server),
            port_file,
        )


if __name__ == "__main__":
    main("orders", run)
