// Gets a token over mTLS, has it judged, revokes it, and reads why it and a wish were refused.
import { createHash, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";

import { type ClientUnaryCall, credentials, Metadata, type ServiceError, status } from "@grpc/grpc-js";

import {
  AuthServiceClient,
  type IssuedToken,
  IssueTokenRequest,
  type IssueTokenResponse,
  RevokeTokenRequest,
  type RevokeTokenResponse,
  TokenView,
  ValidateTokenRequest,
  type ValidateTokenResponse,
} from "../gen/authsvc/v1/auth.js";
import { ErrorReason } from "../gen/authsvc/v1/error_reason.js";
import { ErrorInfo, RetryInfo } from "../gen/google/rpc/error_details.js";
import { Status } from "../gen/google/rpc/status.js";

// A call that broke is sent once more; its deadline holds.
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: "authsvc.v1.AuthService" }],
      timeout: "15s",
      retryPolicy: {
        maxAttempts: 2,
        initialBackoff: "0.2s",
        maxBackoff: "1s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
};

type Done<A> = (error: ServiceError | null, answer: A) => void;

/** One call as a promise; while the server is away it waits for it. */
function call<A>(start: (metadata: Metadata, done: Done<A>) => ClientUnaryCall): Promise<A> {
  return new Promise((resolve, reject) => {
    start(new Metadata({ waitForReady: true }), (error, answer) => {
      if (error) reject(error);
      else resolve(answer);
    });
  });
}

async function story(authsvc: AuthServiceClient, clientId: string, thumbprint: string): Promise<void> {
  const issue = async (scope: string): Promise<IssuedToken> => {
    const request = IssueTokenRequest.fromPartial({
      grant: { $case: "clientCredentials", value: {} },
      clientId,
      scopes: [scope],
    });
    const { token } = await call<IssueTokenResponse>((metadata, done) => authsvc.issueToken(request, metadata, done));
    if (token === undefined) throw new Error("no token came");
    return token;
  };
  const validate = (token: IssuedToken, atLeast: bigint): Promise<ValidateTokenResponse> => {
    const request = ValidateTokenRequest.fromPartial({
      token: token.accessToken,
      audience: "https://reports.example",
      requiredScopes: ["reports.read"],
      presenter: { proof: { $case: "certificateThumbprint", value: thumbprint } },
      consistency: { level: { $case: "atLeast", value: atLeast } },
      view: TokenView.TOKEN_VIEW_CLAIMS,
    });
    return call((metadata, done) => authsvc.validateToken(request, metadata, done));
  };

  const token = await issue("reports.read");
  const [scopes, audiences] = [token.scopes.join(" "), token.audiences.join(" ")];
  console.log(`issued: ${scopes} for ${audiences}, for ${token.expiresIn?.seconds}s`);

  const before = await validate(token, 0n);
  if (!before.active) throw new Error(`the new token is not active: ${reason(before)}`);
  console.log(`active: ${before.claims?.subject}, until ${before.claims?.expireTime?.toISOString()}`);

  const target = { $case: "token", value: token.accessToken } as const;
  const request = RevokeTokenRequest.fromPartial({ target, clientId });
  const { revision } = await call<RevokeTokenResponse>((metadata, done) =>
    authsvc.revokeToken(request, metadata, done),
  );
  const after = await validate(token, revision);
  if (after.active) throw new Error("the revoked token is still active");
  console.log(`inactive: ${reason(after)}`);

  const error: unknown = await issue("admin").then(() => undefined, (error: unknown) => error);
  if (error === undefined) throw new Error("a scope that nobody gave us was issued");
  const refusal = explain(error);
  if (refusal === undefined) throw error;
  console.log(refusal);
}

/** The name of an ErrorReason as ErrorInfo writes it. */
function reason(verdict: ValidateTokenResponse): string {
  return (ErrorReason[verdict.reason] ?? `${verdict.reason}`).replace("ERROR_REASON_", "");
}

/** What the server says of a failure, for programs and in type. */
function explain(error: unknown): string | undefined {
  const [bytes] = (error as Partial<ServiceError>).metadata?.get("grpc-status-details-bin") ?? [];
  if (!(bytes instanceof Buffer)) return undefined;
  const { code, details } = Status.decode(bytes);
  let refusal: string | undefined;
  let retry = "";
  for (const { typeUrl, value } of details) {
    if (typeUrl.endsWith("/google.rpc.ErrorInfo")) {
      const info = ErrorInfo.decode(value);
      const pairs = Object.entries(info.metadata).map(([key, value]) => ` ${key}=${value}`);
      refusal = `refused: ${status[code]} ${info.domain} ${info.reason}${pairs.sort().join("")}`;
    } else if (typeUrl.endsWith("/google.rpc.RetryInfo")) {
      const { retryDelay } = RetryInfo.decode(value);
      retry = `, again after ${retryDelay?.seconds} s`;
    }
  }
  return refusal === undefined ? undefined : refusal + retry;
}

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

async function main(): Promise<void> {
  const ca = readFileSync(setting("AUTHSVC_CA"));
  const certificate = readFileSync(setting("AUTHSVC_CERT"));
  const key = readFileSync(setting("AUTHSVC_KEY"));
  const tls = credentials.createSsl(ca, key, certificate);
  const authsvc = new AuthServiceClient(setting("AUTHSVC_ADDRESS"), tls, {
    "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
  });
  // A backend takes this from the connection that the token came on; here that is our own.
  const thumbprint = createHash("sha256").update(new X509Certificate(certificate).raw).digest("base64url");
  try {
    await story(authsvc, setting("AUTHSVC_CLIENT_ID"), thumbprint);
  } finally {
    authsvc.close();
  }
}

main().catch((error: unknown) => {
  console.error(explain(error) ?? `failed: ${error instanceof Error ? error.message : error}`);
  process.exitCode = 1;
});
