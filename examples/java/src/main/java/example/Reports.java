package example;

import authsvc.v1.AuthServiceGrpc;
import authsvc.v1.AuthServiceGrpc.AuthServiceBlockingStub;
import authsvc.v1.ClientCredentialsGrant;
import authsvc.v1.Consistency;
import authsvc.v1.IssueTokenRequest;
import authsvc.v1.IssuedToken;
import authsvc.v1.Presenter;
import authsvc.v1.RevokeTokenRequest;
import authsvc.v1.TokenView;
import authsvc.v1.ValidateTokenRequest;
import authsvc.v1.ValidateTokenResponse;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Grpc;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.protobuf.StatusProto;
import java.io.File;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.cert.CertificateFactory;
import java.time.Instant;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.TimeUnit;

/** Gets a token over mTLS, has it judged, revokes it, and reads why it and a wish were refused. */
public final class Reports {
  // A call waits while the server is away, and one that broke is sent once more; its deadline holds.
  private static final Map<String, ?> SERVICE_CONFIG =
      Map.of(
          "methodConfig",
          List.of(
              Map.of(
                  "name", List.of(Map.of("service", AuthServiceGrpc.SERVICE_NAME)),
                  "waitForReady", true,
                  "timeout", "15s",
                  "retryPolicy",
                      Map.of(
                          "maxAttempts", 2.0,
                          "initialBackoff", "0.2s",
                          "maxBackoff", "1s",
                          "backoffMultiplier", 2.0,
                          "retryableStatusCodes", List.of("UNAVAILABLE")))));

  private final AuthServiceBlockingStub authsvc;
  private final String clientId;
  private final String thumbprint;

  private Reports(AuthServiceBlockingStub authsvc, String clientId, String thumbprint) {
    this.authsvc = authsvc;
    this.clientId = clientId;
    this.thumbprint = thumbprint;
  }

  public static void main(String[] args) throws Exception {
    var certificate = new File(setting("AUTHSVC_CERT"));
    var credentials =
        TlsChannelCredentials.newBuilder()
            .trustManager(new File(setting("AUTHSVC_CA")))
            .keyManager(certificate, new File(setting("AUTHSVC_KEY")))
            .build();
    ManagedChannel channel =
        Grpc.newChannelBuilder(setting("AUTHSVC_ADDRESS"), credentials)
            .defaultServiceConfig(SERVICE_CONFIG)
            .build();
    try {
      var authsvc = AuthServiceGrpc.newBlockingStub(channel);
      // A backend takes the thumbprint from the connection that the token came on; here, our own.
      new Reports(authsvc, setting("AUTHSVC_CLIENT_ID"), thumbprint(certificate.toPath())).run();
    } catch (StatusRuntimeException refused) {
      System.err.println(explain(refused));
      System.exit(1);
    } finally {
      channel.shutdown().awaitTermination(5, TimeUnit.SECONDS);
    }
  }

  private void run() throws InvalidProtocolBufferException {
    IssuedToken token = issue("reports.read");
    System.out.printf(
        "issued: %s for %s, for %ds%n",
        String.join(" ", token.getScopesList()),
        String.join(" ", token.getAudiencesList()),
        token.getExpiresIn().getSeconds());

    var question =
        ValidateTokenRequest.newBuilder()
            .setToken(token.getAccessToken())
            .setAudience("https://reports.example")
            .addRequiredScopes("reports.read")
            .setPresenter(Presenter.newBuilder().setCertificateThumbprint(thumbprint))
            .setView(TokenView.TOKEN_VIEW_CLAIMS);
    var verdict = authsvc.validateToken(question.build());
    if (!verdict.getActive()) {
      throw new IllegalStateException("the new token is not active: " + reason(verdict));
    }
    var claims = verdict.getClaims();
    System.out.printf(
        "active: %s, until %s%n",
        claims.getSubject(), Instant.ofEpochSecond(claims.getExpireTime().getSeconds()));

    var revoked =
        authsvc.revokeToken(
            RevokeTokenRequest.newBuilder()
                .setToken(token.getAccessToken())
                .setClientId(clientId)
                .build());
    question.setConsistency(Consistency.newBuilder().setAtLeast(revoked.getRevision()));
    verdict = authsvc.validateToken(question.build());
    if (verdict.getActive()) {
      throw new IllegalStateException("the revoked token is still active");
    }
    System.out.printf("inactive: %s%n", reason(verdict));

    try {
      issue("admin");
    } catch (StatusRuntimeException refused) {
      System.out.println(explain(refused));
      return;
    }
    throw new IllegalStateException("a scope that nobody gave us was issued");
  }

  private IssuedToken issue(String scope) {
    var request =
        IssueTokenRequest.newBuilder()
            .setClientCredentials(ClientCredentialsGrant.getDefaultInstance())
            .setClientId(clientId)
            .addScopes(scope);
    return authsvc.issueToken(request.build()).getToken();
  }

  /** The name of an ErrorReason as ErrorInfo writes it. */
  private static String reason(ValidateTokenResponse verdict) {
    return verdict.getReason().name().replace("ERROR_REASON_", "");
  }

  /** What the server says of a failure, for programs and in type. */
  private static String explain(StatusRuntimeException failure)
      throws InvalidProtocolBufferException {
    var status = StatusProto.fromThrowable(failure);
    var refusal = "";
    var retry = "";
    for (Any detail : status == null ? List.<Any>of() : status.getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        var info = detail.unpack(ErrorInfo.class);
        refusal =
            "refused: %s %s %s"
                .formatted(failure.getStatus().getCode(), info.getDomain(), info.getReason());
        for (var pair : new TreeMap<>(info.getMetadataMap()).entrySet()) {
          refusal += " %s=%s".formatted(pair.getKey(), pair.getValue());
        }
      } else if (detail.is(RetryInfo.class)) {
        var delay = detail.unpack(RetryInfo.class).getRetryDelay();
        retry = ", again after %d s".formatted(delay.getSeconds());
      }
    }
    return refusal.isEmpty() ? "failed: " + failure.getMessage() : refusal + retry;
  }

  private static String thumbprint(Path certificate) throws Exception {
    try (InputStream pem = Files.newInputStream(certificate)) {
      byte[] der = CertificateFactory.getInstance("X.509").generateCertificate(pem).getEncoded();
      byte[] digest = MessageDigest.getInstance("SHA-256").digest(der);
      return Base64.getUrlEncoder().withoutPadding().encodeToString(digest);
    }
  }

  private static String setting(String name) {
    String value = System.getenv(name);
    if (value == null) {
      throw new IllegalArgumentException(name + " is not set");
    }
    return value;
  }
}
