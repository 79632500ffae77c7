// Gets a token over mTLS, has it judged, revokes it, and reads why it and a wish were refused.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	authsvcv1 "example.com/reports/gen/authsvc/v1"
)

// A call waits while the server is away, and one that broke is sent once more; its deadline holds.
const serviceConfig = `{"methodConfig": [{
	"name": [{"service": "authsvc.v1.AuthService"}],
	"waitForReady": true,
	"timeout": "15s",
	"retryPolicy": {
		"maxAttempts": 2, "initialBackoff": "0.2s", "maxBackoff": "1s", "backoffMultiplier": 2,
		"retryableStatusCodes": ["UNAVAILABLE"]
	}
}]}`

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, explain(err))
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	certificate, err := tls.LoadX509KeyPair(os.Getenv("AUTHSVC_CERT"), os.Getenv("AUTHSVC_KEY"))
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(os.Getenv("AUTHSVC_CA"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return errors.New("no certificate in AUTHSVC_CA")
	}
	conn, err := grpc.NewClient(
		os.Getenv("AUTHSVC_ADDRESS"),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			Certificates: []tls.Certificate{certificate},
			RootCAs:      roots,
		})),
		grpc.WithDefaultServiceConfig(serviceConfig),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	// A backend takes this from the connection that the token came on; here that is our own.
	thumbprint := sha256.Sum256(certificate.Certificate[0])
	return story(ctx, authsvcv1.NewAuthServiceClient(conn), os.Getenv("AUTHSVC_CLIENT_ID"),
		base64.RawURLEncoding.EncodeToString(thumbprint[:]))
}

func story(ctx context.Context, authsvc authsvcv1.AuthServiceClient, clientID, thumbprint string) error {
	issue := func(scope string) (*authsvcv1.IssueTokenResponse, error) {
		return authsvc.IssueToken(ctx, &authsvcv1.IssueTokenRequest{
			Grant:    &authsvcv1.IssueTokenRequest_ClientCredentials{ClientCredentials: &authsvcv1.ClientCredentialsGrant{}},
			ClientId: clientID,
			Scopes:   []string{scope},
		})
	}
	issued, err := issue("reports.read")
	if err != nil {
		return err
	}
	token := issued.GetToken()
	fmt.Printf("issued: %s for %s, for %s\n", strings.Join(token.GetScopes(), " "),
		strings.Join(token.GetAudiences(), " "), token.GetExpiresIn().AsDuration())

	question := &authsvcv1.ValidateTokenRequest{
		Token:          token.GetAccessToken(),
		Audience:       "https://reports.example",
		RequiredScopes: []string{"reports.read"},
		Presenter:      &authsvcv1.Presenter{Proof: &authsvcv1.Presenter_CertificateThumbprint{CertificateThumbprint: thumbprint}},
		View:           authsvcv1.TokenView_TOKEN_VIEW_CLAIMS,
	}
	verdict, err := authsvc.ValidateToken(ctx, question)
	if err != nil {
		return err
	}
	if !verdict.GetActive() {
		return fmt.Errorf("the new token is not active: %s", reason(verdict))
	}
	fmt.Printf("active: %s, until %s\n", verdict.GetClaims().GetSubject(),
		verdict.GetClaims().GetExpireTime().AsTime().Format(time.RFC3339))

	revoked, err := authsvc.RevokeToken(ctx, &authsvcv1.RevokeTokenRequest{
		Target:   &authsvcv1.RevokeTokenRequest_Token{Token: token.GetAccessToken()},
		ClientId: clientID,
	})
	if err != nil {
		return err
	}
	question.Consistency = &authsvcv1.Consistency{Level: &authsvcv1.Consistency_AtLeast{AtLeast: revoked.GetRevision()}}
	if verdict, err = authsvc.ValidateToken(ctx, question); err != nil {
		return err
	}
	if verdict.GetActive() {
		return errors.New("the revoked token is still active")
	}
	fmt.Printf("inactive: %s\n", reason(verdict))

	if _, err = issue("admin"); err == nil {
		return errors.New("a scope that nobody gave us was issued")
	}
	fmt.Println(explain(err))
	return nil
}

// reason is the name of an ErrorReason as ErrorInfo.Reason writes it.
func reason(verdict *authsvcv1.ValidateTokenResponse) string {
	return strings.TrimPrefix(verdict.GetReason().String(), "ERROR_REASON_")
}

// explain tells what the server says of a failure, for programs and in type.
func explain(err error) string {
	failure, ok := status.FromError(err)
	if !ok {
		return "failed: " + err.Error()
	}
	refusal, retry := "", ""
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			refusal = fmt.Sprintf("refused: %s %s %s", failure.Code(), detail.GetDomain(), detail.GetReason())
			for _, key := range slices.Sorted(maps.Keys(detail.GetMetadata())) {
				refusal += fmt.Sprintf(" %s=%s", key, detail.GetMetadata()[key])
			}
		case *errdetails.RetryInfo:
			retry = fmt.Sprintf(", again after %s", detail.GetRetryDelay().AsDuration())
		}
	}
	if refusal == "" {
		return fmt.Sprintf("failed: %s %s", failure.Code(), failure.Message())
	}
	return refusal + retry
}
