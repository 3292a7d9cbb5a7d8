// Submits a job once, follows it over every broken connection, and prints how it ended.
//
//	go mod init example.com/follow
//	for file in job job_service; do M=$M,Mjobsvc/v1/$file.proto=example.com/follow/jobsvcpb; done
//	protoc -I protos --go_out=module=example.com/follow$M:. \
//	    --go-grpc_out=module=example.com/follow$M:. jobsvc/v1/job.proto jobsvc/v1/job_service.proto
//	go mod tidy
//	go run . demo.sleep '{"seconds": 5, "steps": 5}' order-17
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"math/rand"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	pb "example.com/follow/jobsvcpb"
)

func setting(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func dial() (*grpc.ClientConn, error) {
	// grpc-go 1.43 and later: grpc.WithTransportCredentials(insecure.NewCredentials()).
	security := grpc.WithInsecure()
	if ca := os.Getenv("JOBSVC_TLS_CA"); ca != "" { // a PEM file; turns TLS on
		tls, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return nil, err
		}
		security = grpc.WithTransportCredentials(tls)
	}
	reconnect := backoff.DefaultConfig
	reconnect.MaxDelay = 10 * time.Second
	return grpc.Dial(setting("JOBSVC_ADDRESS", "127.0.0.1:50051"), security,
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect}))
}

// The server went away, sent us away for reading too slowly, stopped, or did not answer in time; or
// we gave a silent stream up, which is Canceled too.
func transient(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Aborted, codes.Canceled, codes.DeadlineExceeded:
		return true
	}
	return false
}

// pause waits for a random time up to a bound that doubles from 0.2 s to 10 s.
type pause time.Duration

func (bound *pause) wait() {
	if *bound == 0 {
		*bound = pause(200 * time.Millisecond)
	}
	time.Sleep(time.Duration(rand.Int63n(int64(*bound))))
	if *bound *= 2; *bound > pause(10*time.Second) {
		*bound = pause(10 * time.Second)
	}
}

// insist calls until there is an answer. SubmitJob too: its key makes that safe.
func insist(ctx context.Context, call func(context.Context) error) error {
	for waits := pause(0); ; waits.wait() {
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := call(limited)
		cancel()
		if err == nil || !transient(err) {
			return err
		}
		log.Printf("%v; trying again", err)
	}
}

// watch hands over every event once and in order, until the job has ended.
func watch(ctx context.Context, jobs pb.JobServiceClient, id string, seen func(*pb.JobEvent)) error {
	seconds, err := strconv.Atoi(setting("HEARTBEAT_SECONDS", "15"))
	if err != nil {
		return err
	}
	heartbeat := time.Duration(seconds) * time.Second
	request := &pb.WatchJobRequest{JobId: id, HeartbeatInterval: durationpb.New(heartbeat)}
	for waits := pause(0); ; waits.wait() {
		err := stream(ctx, jobs, request, 3*heartbeat, func(event *pb.JobEvent) {
			request.AfterSequence = event.Sequence
			waits = 0
			seen(event)
		})
		if err == nil || !transient(err) {
			return err
		}
		log.Printf("%v; resuming after %d", err, request.AfterSequence)
	}
}

// stream hands over the events of one call; nil when the job has ended.
func stream(ctx context.Context, jobs pb.JobServiceClient, request *pb.WatchJobRequest,
	silence time.Duration, seen func(*pb.JobEvent)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silent := time.AfterFunc(silence, cancel)
	defer silent.Stop()
	messages, err := jobs.WatchJob(ctx, request)
	if err != nil {
		return err
	}
	for {
		message, err := messages.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		silent.Reset(silence)
		if event := message.GetEvent(); event != nil {
			seen(event)
		}
	}
}

func run(jobType, payload, key string) (*pb.GetResultResponse, error) {
	connection, err := dial()
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	jobs := pb.NewJobServiceClient(connection)
	ctx := context.Background()
	if token := os.Getenv("JOBSVC_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}

	input := &structpb.Struct{}
	if err := protojson.Unmarshal([]byte(payload), input); err != nil {
		return nil, err
	}
	submit := &pb.SubmitJobRequest{
		JobType: jobType,
		Input:   &pb.SubmitJobRequest_Payload{Payload: input},
		// Says what the job is for, so that whoever asks again gets the same job.
		IdempotencyKey: key,
	}
	var job *pb.Job
	err = insist(ctx, func(ctx context.Context) error {
		answer, err := jobs.SubmitJob(ctx, submit)
		job = answer.GetJob()
		return err
	})
	if err != nil {
		return nil, err
	}
	fmt.Println("job", job.JobId)
	err = watch(ctx, jobs, job.JobId, func(event *pb.JobEvent) {
		// A type that this program does not know is a number.
		kind := strings.TrimPrefix(event.Type.String(), "JOB_EVENT_TYPE_")
		fmt.Println(event.Sequence, kind, strings.TrimPrefix(event.State.String(), "JOB_STATE_"))
	})
	if err != nil {
		return nil, err
	}
	var result *pb.GetResultResponse
	err = insist(ctx, func(ctx context.Context) (err error) {
		result, err = jobs.GetResult(ctx, &pb.GetResultRequest{JobId: job.JobId})
		return err
	})
	return result, err
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: follow JOB_TYPE PAYLOAD KEY")
	}
	answer, err := run(os.Args[1], os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	var outcome proto.Message = answer.GetError()
	kind := "error"
	switch answer.Outcome.(type) {
	case *pb.GetResultResponse_Result:
		kind, outcome = "result", answer.GetResult()
	case *pb.GetResultResponse_ResultBlob:
		kind, outcome = "result_blob", answer.GetResultBlob()
	}
	text, err := protojson.Marshal(outcome)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(kind, string(text))
	if answer.State != pb.JobState_JOB_STATE_SUCCEEDED {
		os.Exit(1)
	}
}
